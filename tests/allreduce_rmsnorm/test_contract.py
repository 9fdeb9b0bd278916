"""What the op promises besides its values: determinism, strides, emptiness, guards, 64-bit offsets, the launch plan."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch

from tokenweave_ops import testing

family = testing.family("allreduce_rmsnorm")

BF16 = torch.bfloat16


def run_add(backend, x, residual, weight, **options):
    with backend.use(family):
        family.add_rms_norm_(x, residual, weight, **options)
    return x, residual


def fresh(backend, *shape, dtype=BF16):
    hidden = shape[-1]
    return (
        backend.tensor(*shape, dtype=dtype, seed=1),
        backend.tensor(*shape, dtype=dtype, seed=2),
        backend.tensor(hidden, dtype=dtype, seed=3),
    )


# ---------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("hidden", [57, 128, 1096])
def test_same_bits_every_run(backend, hidden):
    runs = [run_add(backend, *fresh(backend, 9, hidden)) for _ in range(4)]
    for y, h in runs[1:]:
        assert torch.equal(y, runs[0][0]) and torch.equal(h, runs[0][1])


@pytest.mark.parametrize("hidden", [57, 128, 1096])
def test_a_row_does_not_depend_on_its_batch(backend, hidden):
    x, residual, weight = fresh(backend, 13, hidden)
    alone_y, alone_h = run_add(backend, x[6:7].clone(), residual[6:7].clone(), weight)
    y, h = run_add(backend, x, residual, weight)
    assert torch.equal(y[6:7], alone_y) and torch.equal(h[6:7], alone_h)


def test_same_bits_for_every_schedule(simt):
    emulator = testing.host().simt
    saved = emulator.options()
    results = []
    try:
        for seed in range(6):
            emulator.set_options(**{**saved, "seed": seed})
            results.append(run_add(simt, *fresh(simt, 3, 1096)))
    finally:
        emulator.set_options(**saved)
    assert all(torch.equal(y, results[0][0]) and torch.equal(h, results[0][1]) for y, h in results)


@pytest.mark.parametrize("hidden", [57, 128, 1096])
def test_blocks_that_take_several_rows(simt, hidden):
    """With the grid capped below the number of rows, blocks stride: same bits, and shared memory is reused safely."""
    emulator = testing.host().simt
    saved = emulator.options()
    expected = run_add(simt, *fresh(simt, 23, hidden))
    try:
        for seed in range(8):
            emulator.set_options(**{**saved, "seed": seed, "max_grid": 2})
            y, h = run_add(simt, *fresh(simt, 23, hidden))
            assert torch.equal(y, expected[0]) and torch.equal(h, expected[1])
    finally:
        emulator.set_options(**saved)


def test_gradient_blocks_that_take_several_rows(simt):
    emulator = testing.host().simt
    saved = emulator.options()
    x, residual, weight = fresh(simt, 23, 264)
    rstd = torch.rand(23)
    expected = simt.ops.rms_norm_backward(x, residual, residual, weight, rstd, 1.0)
    try:
        for seed in range(4):
            emulator.set_options(**{**saved, "seed": seed, "max_grid": 3})
            actual = simt.ops.rms_norm_backward(x, residual, residual, weight, rstd, 1.0)
            assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    finally:
        emulator.set_options(**saved)


@pytest.mark.parametrize("hidden", [64, 1024])
def test_a_row_of_a_misaligned_batch_does_not_depend_on_it(backend, hidden):
    """Pitch hidden + 1: every fourth fp32 row is 16-byte aligned by chance, and must not get another kernel for it."""
    weight = backend.tensor(hidden, dtype=torch.float32, seed=3)
    wide = backend.tensor(16, hidden + 1, dtype=torch.float32, seed=1)[:, :hidden]
    with backend.use(family):
        together = family.rms_norm(wide, weight)
        for row in range(16):
            assert torch.equal(family.rms_norm(wide[row : row + 1], weight), together[row : row + 1])


def test_autograd_notices_what_was_overwritten(backend):
    """A tensor saved for a backward pass and then overwritten by an inference op is an error, not a wrong gradient."""
    x, residual, weight = fresh(backend, 4, 16, dtype=torch.float32)
    parameter = torch.ones_like(x).requires_grad_()
    for overwrite in (
        lambda: family.add_rms_norm_(x, residual, weight),
        lambda: family.add_rms_norm_(residual, x, weight),
        lambda: family.rms_norm(residual, weight, out=x),
    ):
        product = (x * parameter).sum()
        with backend.use(family):
            overwrite()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    with backend.use(family):
        y, h = family.add_rms_norm_train(x, residual, parameter[0])
        with torch.no_grad():
            family.add_rms_norm_(x, h, weight)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_weight_gradient_is_deterministic(backend):
    x, residual, weight = (tensor.requires_grad_() for tensor in fresh(backend, 130, 40))
    grads = []
    for _ in range(3):
        with backend.use(family):
            y, h = family.add_rms_norm_train(x, residual, weight)
            grads.append(torch.autograd.grad((y * h).sum(), weight)[0])
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_thread_count_does_not_change_bits():
    backend_inputs = torch.randn(257, 2048).to(BF16), torch.randn(257, 2048).to(BF16), torch.randn(2048).to(BF16)
    saved = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x, residual, weight = (tensor.clone() for tensor in backend_inputs)
            family.add_rms_norm_(x, residual, weight)
            results.append((x, residual))
    finally:
        torch.set_num_threads(saved)
    assert all(torch.equal(x, results[0][0]) and torch.equal(h, results[0][1]) for x, h in results)


ISA_SCRIPT = """
import hashlib, torch, tokenweave_ops as ops
digest = hashlib.sha256()
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for hidden in (1, 15, 33, 64, 1000):
        generator = torch.Generator().manual_seed(hidden)
        x, residual = (torch.randn(7, hidden, generator=generator).to(dtype) for _ in range(2))
        x[0, 0], x[1, 0] = float("nan"), float("inf")
        residual[2] *= 1e-7
        weight = torch.randn(hidden, generator=generator).to(dtype)
        for tensor in (x, residual, weight):
            tensor.requires_grad_()
        y, h = ops.add_rms_norm_train(x, residual, weight)
        grads = torch.autograd.grad(y[2:].float().square().sum() + h[2:].float().sum(), (x, weight))
        for tensor in (y, h, *grads):
            tensor = tensor.detach().float().nan_to_num(nan=12345.0)
            digest.update(tensor.numpy().tobytes())
print(digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    """baseline, AVX2 and AVX-512 kernels agree bit for bit (sets this machine lacks fall back to what it has)."""
    digests = {}
    for isa in ("baseline", "avx2", "avx512"):
        environment = {**os.environ, "TOKENWEAVE_CPU_ISA": isa}
        done = subprocess.run(
            [sys.executable, "-c", ISA_SCRIPT], env=environment, capture_output=True, text=True, check=True
        )
        digests[isa] = done.stdout.strip()
    assert len(digests["baseline"]) == len(hashlib.sha256().hexdigest())
    assert len(set(digests.values())) == 1, digests


# ------------------------------------------------------------------------------------------------ strides and emptiness


def poisoned(backend, *shape):
    return torch.full(shape, float("nan"), dtype=BF16, device=backend.device)


@pytest.mark.parametrize("hidden", [24, 31])
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_strided_and_misaligned_rows(backend, hidden, offset):
    """Rows inside a wider, poisoned buffer: right values inside, untouched poison outside."""
    x, residual, weight = fresh(backend, 5, hidden)
    wide_x, wide_residual = poisoned(backend, 5, hidden + 16), poisoned(backend, 5, hidden + 40)
    view_x, view_residual = wide_x[:, offset : offset + hidden], wide_residual[:, 8 : 8 + hidden]
    view_x.copy_(x)
    view_residual.copy_(residual)
    run_add(backend, view_x, view_residual, weight)
    expected_y, expected_h = run_add(backend, x, residual, weight)
    # Another alignment may take another kernel, which adds the squares in another order.
    torch.testing.assert_close(view_x, expected_y, rtol=2**-7, atol=0)
    assert torch.equal(view_residual, expected_h)
    assert wide_x[:, :offset].isnan().all() and wide_x[:, offset + hidden :].isnan().all()
    assert wide_residual[:, :8].isnan().all() and wide_residual[:, 8 + hidden :].isnan().all()


def test_heads_of_a_packed_qkv(backend):
    """Two row strides: the queries and keys inside [tokens, heads, head_dim] are normed in place, values untouched."""
    packed = backend.tensor(6, 5, 32, dtype=BF16, seed=4)
    original = packed.clone()
    weight = backend.tensor(32, dtype=BF16, seed=5)
    queries = packed[:, :3]
    with backend.use(family):
        expected = family.rms_norm(queries.contiguous(), weight)
        new = family.rms_norm(queries, weight)
        family.rms_norm(original[:, :3], weight, out=queries)
    assert new.is_contiguous() and torch.equal(new, expected)
    assert torch.equal(queries, expected) and torch.equal(packed[:, 3:], original[:, 3:])


def test_transposed_batch(backend):
    x, residual, weight = fresh(backend, 4, 3, 40)
    expected_y, expected_h = run_add(backend, x.clone(), residual.clone(), weight)
    y, h = run_add(backend, x.transpose(0, 1), residual.transpose(0, 1), weight)
    assert torch.equal(y.transpose(0, 1), expected_y) and torch.equal(h.transpose(0, 1), expected_h)


def test_interleaved_parts_of_one_buffer_do_not_overlap(backend):
    """Queries into keys of a packed qkv, and chunks of a three-dimensional buffer: disjoint, in ranges that mesh."""
    packed = backend.tensor(6, 5, 32, dtype=BF16, seed=4)
    weight = backend.tensor(32, dtype=BF16, seed=5)
    with backend.use(family):
        expected = family.rms_norm(packed[:, :2].contiguous(), weight)
        family.rms_norm(packed[:, :2], weight, out=packed[:, 2:4])
        assert torch.equal(packed[:, 2:4], expected)
        x, residual = packed[:, :4].chunk(2, dim=1)
        want = x + residual
        family.add_rms_norm_(x, residual, weight)
        assert torch.equal(residual, want)


def test_two_halves_of_one_buffer_do_not_overlap(backend):
    x, residual, weight = fresh(backend, 4, 16)
    both = torch.cat([x, residual], dim=1)
    expected = run_add(backend, x, residual, weight)
    y, h = run_add(backend, both[:, :16], both[:, 16:], weight)
    assert torch.equal(y, expected[0]) and torch.equal(h, expected[1])


def test_one_dimensional_and_expanded_inputs(backend):
    x, _, weight = fresh(backend, 40)
    with backend.use(family):
        row = family.rms_norm(x, weight)
        repeated = family.rms_norm(x.expand(3, 40), weight)
    assert row.shape == (40,) and torch.equal(repeated, row.expand(3, 40))


@pytest.mark.no_launch
@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (2, 3, 0, 16)])
def test_no_rows(backend, shape):
    x, residual, weight = fresh(backend, *shape)
    if len(shape) == 4:
        x = backend.tensor(0, 3, 2, 16, dtype=BF16).permute(2, 1, 0, 3)
    run_add(backend, x, residual, weight)
    with backend.use(family):
        assert family.rms_norm(x, weight).shape == shape
        y, h = family.add_rms_norm_train(x, residual, weight.requires_grad_())
        (grad,) = torch.autograd.grad((y.sum() + h.sum()), weight)
    assert y.shape == shape and (grad == 0).all()


@pytest.mark.parametrize("shape", [(2, 64), (2, 3, 64)], ids=["one stride", "two strides"])
def test_row_offsets_beyond_32_bits(backend, shape):
    """Rows 2^32 elements apart: signed and unsigned 32 bits wrap. What lies between is reserved, not touched."""
    stride = 2**32
    strides = (stride, 1) if len(shape) == 2 else (stride, 128, 1)
    wide = torch.empty(stride + 3 * 128, dtype=BF16, device=backend.device).as_strided(shape, strides)
    x, residual, weight = fresh(backend, *shape)
    wide.copy_(x)
    expected_y, _ = run_add(backend, x, residual.clone(), weight)
    y, _ = run_add(backend, wide, residual, weight)
    assert torch.equal(y, expected_y)


# --------------------------------------------------------------------------------------------------- grad, launch plan


@pytest.mark.no_launch
def test_inference_forms_refuse_grad(backend):
    x, residual, weight = fresh(backend, 2, 16)
    weight.requires_grad_()
    before = x.clone(), residual.clone()
    with backend.use(family):
        with pytest.raises(RuntimeError, match="add_rms_norm_: an input requires grad.*use add_rms_norm_train"):
            family.add_rms_norm_(x, residual, weight)
        with pytest.raises(RuntimeError, match="rms_norm: an input requires grad.*use rms_norm_train"):
            family.rms_norm(x, weight)
        with pytest.raises(RuntimeError, match="rms_norm: an input requires grad"):
            family.rms_norm(x, weight.detach(), out=torch.empty_like(x).requires_grad_())
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


def test_no_grad_mode_accepts_parameters(backend):
    x, residual, weight = fresh(backend, 2, 16)
    weight = torch.nn.Parameter(weight)
    with torch.no_grad():
        run_add(backend, x, residual, weight)
    with torch.inference_mode():
        run_add(backend, *(tensor.clone() for tensor in (x, residual)), weight)


@pytest.fixture
def plan(host):
    return lambda num_rows, hidden, dtype="bf16", aligned=True: host.plan_rms_norm(num_rows, hidden, dtype, aligned)


def test_plan_covers_every_row_and_pack(plan):
    for dtype, per_pack in (("bf16", 8), ("fp16", 8), ("fp32", 4)):
        for hidden in (*range(1, 1100, 7), 4096, 5120, 8192, 16384, 28672, 32768, 65535, 65536):
            for rows in (1, 3, 4, 5, 1000):
                p = plan(rows, hidden, dtype)
                assert p.block_x % 32 == 0 and 32 <= p.block_x * p.block_y <= 1024
                assert p.grid * p.block_y >= rows, "a block per group of rows"
                assert p.block_y == 1 or p.block_x == 32, "rows share a block only as one warp each"
                if p.packs_per_thread:
                    assert hidden % per_pack == 0
                    assert p.packs_per_thread * p.block_x >= hidden // per_pack, "each pack has its thread"
                    assert p.block_x <= (512 if p.packs_per_thread <= 2 else 1024), "the kernel's launch bounds"


def test_plan_uses_registers_where_the_row_allows(plan):
    assert plan(1, 4096).packs_per_thread == 1 and plan(1, 4096).block_x == 512
    assert plan(1, 8192).packs_per_thread == 2 and plan(1, 65536).packs_per_thread == 8
    assert plan(1, 4096, aligned=False).packs_per_thread == 0
    assert plan(1, 4097).packs_per_thread == 0
    assert plan(1, 65536, "fp32").packs_per_thread == 0, "256 KiB do not fit a block's registers"


def test_plan_beyond_32_bits_without_allocating(plan):
    p = plan(2**40, 4096)
    assert p.grid == 2**31 - 1, "the grid stops at the hardware's limit; blocks stride over the rest"
    assert plan(2**31 + 5, 4096).grid == 2**31 - 1
    assert plan(2**33, 64).grid == 2**31 - 1 and plan(2**33, 64).block_y == 4


# ------------------------------------------------------------------------------------------------------------ CUDA only


def test_runs_on_the_current_stream(cuda):
    x, residual, weight = fresh(cuda, 64, 4096)
    expected = run_add(cuda, x.clone(), residual.clone(), weight)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the op must wait behind this, and the copy behind the op
        family.add_rms_norm_(x, residual, weight)
        y = x.clone()
    assert not stream.query(), "the op must not have run on another stream, or synchronised"
    stream.synchronize()
    assert torch.equal(y, expected[0])


def test_graph_capture_and_replay(cuda):
    x, residual, weight = fresh(cuda, 64, 4096)
    static_x, static_residual = x.clone(), residual.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        family.add_rms_norm_(static_x, static_residual, weight)
        normed = family.rms_norm(static_x, weight)
    for _ in range(2):
        static_x.copy_(x)
        static_residual.copy_(residual)
        graph.replay()
        expected = run_add(cuda, x.clone(), residual.clone(), weight)
        assert torch.equal(static_x, expected[0]) and torch.equal(static_residual, expected[1])
        assert torch.equal(normed, family.rms_norm(expected[0], weight))


def test_graph_capture_of_a_training_step(cuda):
    """Forward and backward of both training forms, captured in one graph and replayed on new values."""
    x, residual, weight = (tensor.requires_grad_() for tensor in fresh(cuda, 70, 520))

    def step():
        y, h = family.add_rms_norm_train(x, residual, weight)
        return torch.autograd.grad((family.rms_norm_train(y, weight) * h).sum(), (x, residual, weight))

    warm_up = torch.cuda.Stream()
    with torch.cuda.stream(warm_up):
        step()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.mul_(-0.5)
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        assert torch.equal(one, other)


def test_device_guard(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x, residual, weight = (tensor.to("cuda:1") for tensor in fresh(cuda, 4, 128))
    with torch.cuda.device(0):
        run_add(cuda, x, residual, weight)
        assert torch.cuda.current_device() == 0
