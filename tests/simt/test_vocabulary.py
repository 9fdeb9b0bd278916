"""The words of csrc/core, emulated, against Python: reductions, packs, philox, conversions, exchanges, memory ops."""

from enum import IntEnum

import numpy as np
import pytest
import torch

WarpOp = IntEnum("WarpOp", "shuffle shuffle_xor shuffle_up shuffle_down ballot any all", start=0)
MemoryOp = IntEnum(
    "MemoryOp",
    "load_relaxed load_acquire store_relaxed store_release cas_relaxed cas_acquire cas_release cas_acq_rel "
    "add_relaxed add_acquire add_release add_acq_rel",
    start=0,
)
DTYPES = {"bf16": (0, torch.bfloat16), "fp16": (1, torch.float16), "fp32": (2, torch.float32)}
FLOAT32_EPS = np.finfo(np.float32).eps


# ---------------------------------------------------------------------------------------------------------- reductions


def butterfly(values):
    """What warp_sum must give, addition by addition: all lanes of a warp hold the same bits at the end."""
    for offset in (16, 8, 4, 2, 1):
        values = values + values[..., np.arange(32) ^ offset]
    return values


def test_warp_sum(kernels):
    data = np.random.default_rng(0).standard_normal((3, 4, 32)).astype(np.float32)
    out = np.full_like(data, np.nan)
    kernels.vocabulary.warp_sums(data, out, 3, 128)
    assert np.array_equal(out, butterfly(data))
    exact = data.sum(-1, dtype=np.float64, keepdims=True)
    assert np.abs(out - exact).max() <= 5 * FLOAT32_EPS * np.abs(data).sum(-1).max()


def test_warp_sum_of_doubles(kernels):
    """Every bit of a double travels: the sum is that of the lanes in the same order, in float64."""
    data = np.random.default_rng(1).standard_normal((3, 4, 32)) * 10.0 ** np.arange(-16, 16)
    out = np.full_like(data, np.nan)
    kernels.vocabulary.warp_sums_fp64(data, out, 3, 128)
    assert np.array_equal(out, butterfly(data))


def test_counts_in_shared_memory(kernels):
    words = np.random.default_rng(2).integers(0, 32, 1001).astype(np.uint32)
    out = np.full((3, 32), 7, np.uint32)
    kernels.vocabulary.count_shared(words, out, len(words), 3, 96)
    assert np.array_equal(out.sum(0), np.bincount(words, minlength=32))
    assert (out.sum(1) > 0).all(), "every block counted apart"


@pytest.mark.parametrize(
    "block", [(32, 1), (64, 1), (96, 1), (512, 1), (1024, 1), (32, 2), (64, 16), (128, 3)], ids=str
)
def test_block_sum(kernels, simt, block):
    threads = block[0] * block[1]
    data = np.random.default_rng(threads).standard_normal((3, threads)).astype(np.float32)
    warps = np.zeros((3, 32), np.float32)
    warps[:, : threads // 32] = butterfly(data.reshape(3, -1, 32))[..., 0]
    expected = np.broadcast_to(butterfly(warps)[:, :1], data.shape)
    for seed in range(20):
        simt.set_options(seed=seed)
        out = np.full((2, 3, threads), np.nan, np.float32)
        kernels.vocabulary.block_sums(data, out, 3, *block)
        assert np.array_equal(out[0], expected), "the order of additions is part of the contract"
        assert np.array_equal(out[1], 2 * expected)
    exact = data.sum(-1, dtype=np.float64, keepdims=True)
    assert np.abs(expected - exact).max() <= 10 * FLOAT32_EPS * np.abs(data).sum(-1).max()


# --------------------------------------------------------------------------------------------------------------- packs


@pytest.mark.parametrize("dtype", DTYPES)
def test_packs_at_every_misalignment(kernels, dtype):
    code, torch_dtype = DTYPES[dtype]
    size = torch_dtype.itemsize
    per_pack, num_packs = 16 // size, 70
    n = per_pack * num_packs
    source = torch.randn(n + 3 * per_pack, generator=torch.Generator().manual_seed(0)).to(torch_dtype)
    for in_offset in range(per_pack):
        for out_offset in range(per_pack):
            out = torch.full_like(source, -7.0)
            unpacked = np.full(n, np.nan, np.float32)
            kernels.vocabulary.copy_packs(
                code, source.data_ptr() + in_offset * size, out.data_ptr() + out_offset * size, unpacked, num_packs
            )
            expected = source[in_offset : in_offset + n]
            assert torch.equal(torch.from_numpy(unpacked), expected.float())
            assert torch.equal(out[out_offset : out_offset + n], expected)
            assert (out[:out_offset] == -7).all(), "wrote before the first element"
            assert (out[out_offset + n :] == -7).all(), "wrote past the last element"


# -------------------------------------------------------------------------------------------------------------- philox

# Random123's known answers for philox4x32-10: counter, key, result.
PHILOX = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


def test_philox_known_answers(kernels):
    counters = np.array([words(counter) for counter, _, _ in PHILOX], np.uint32)
    keys = np.array([words(key) for _, key, _ in PHILOX], np.uint32)
    out, uniforms = np.zeros_like(counters), np.zeros(3, np.float32)
    kernels.vocabulary.philox(counters, keys, out, uniforms, 3)
    assert out.tolist() == [words(result) for _, _, result in PHILOX]
    assert uniforms.tolist() == [(word >> 8) / 2**24 for word in out[:, 0].tolist()]


# --------------------------------------------------------------------------------------------------------- conversions


def floats_around(torch_dtype):
    """fp32 bit patterns where rounding to a 16-bit format can go wrong: every value of the format, the midpoints
    between neighbours, one fp32 step beside each of those; and a million random patterns."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch_dtype).float()
    bits = every.numpy().view(np.uint32).astype(np.int64)
    magnitude = np.unique(bits[np.isfinite(every.numpy())] & 0x7FFFFFFF)
    with np.errstate(over="ignore"):
        values = magnitude.astype(np.uint32).view(np.float32).astype(np.float64)
        midpoints = ((values[1:] + values[:-1]) / 2).astype(np.float32)  # exact: fp32 has the bits to spare
    last_step = values[-1] - values[-2]
    with np.errstate(over="ignore"):  # of bf16 these are beyond fp32 too
        beyond = np.array([values[-1] + last_step / 2, values[-1] + last_step]).astype(np.float32)
    near = np.concatenate([magnitude, midpoints.view(np.uint32), beyond.view(np.uint32)]).astype(np.int64)
    near = np.concatenate([near - 1, near, near + 1]) & 0x7FFFFFFF
    random = np.random.default_rng(0).integers(0, 2**32, 1_000_000)
    specials = np.array([0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF, 1, 0x80000001, 0x7F7FFFFF])
    return np.concatenate([near, near | 0x80000000, random, specials, bits]).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_16_bit_pattern_to_float(kernels, dtype):
    code, torch_dtype = DTYPES[dtype]
    patterns = np.arange(65536, dtype=np.uint16)
    out = np.zeros(65536, np.float32)
    kernels.vocabulary.widen(code, patterns, out, 65536)
    expected = torch.from_numpy(patterns.view(np.int16)).view(torch_dtype).float().numpy()
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(out), nan)
    assert np.array_equal(out.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_float_to_16_bit_rounds_to_nearest_even(kernels, dtype):
    code, torch_dtype = DTYPES[dtype]
    values = floats_around(torch_dtype)
    out = np.zeros(len(values), np.uint16)
    kernels.vocabulary.narrow(code, values, out, len(values))
    expected = torch.from_numpy(values).to(torch_dtype)
    actual = torch.from_numpy(out.view(np.int16)).view(torch_dtype)
    nan = torch.from_numpy(np.isnan(values))
    assert torch.equal(actual.isnan(), nan)
    different = (actual.view(torch.int16) != expected.view(torch.int16)) & ~nan
    assert not different.any(), (
        f"{values[different.numpy()][:5]} -> {actual[different][:5]}, not {expected[different][:5]}"
    )


def test_arithmetic_is_correctly_rounded(kernels):
    rng = np.random.default_rng(0)
    a, b, c = ((rng.standard_normal(4096) * 2.0 ** rng.integers(-60, 60, 4096)).astype(np.float32) for _ in range(3))
    out = np.zeros_like(a)
    kernels.vocabulary.arithmetic(a, b, c, out, len(a), 0)
    assert np.array_equal(out, a / b)
    kernels.vocabulary.arithmetic(np.abs(a), b, c, out, len(a), 1)
    assert np.array_equal(out, np.sqrt(np.abs(a)))
    # One rounding: where the float64 sum of the exact product is itself exact, it says what that rounding gives.
    c = (-(a.astype(np.float64) * b)).astype(np.float32)  # cancels: a separate rounding of the product would give zero
    kernels.vocabulary.arithmetic(a, b, c, out, len(a), 2)
    assert np.array_equal(out, (a.astype(np.float64) * b + c).astype(np.float32))
    assert (out != 0).any()


def test_choices_and_rounding_directions(kernels):
    """The operations of the enum Arithmetic from maximum on, NaN, infinities and zeros among the arguments."""
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.5, 2.0**-149, 3e38]
    rng = np.random.default_rng(1)
    a = np.concatenate([np.repeat(special, len(special)), rng.normal(size=500) * 30]).astype(np.float32)
    b = np.concatenate([np.tile(special, len(special)), rng.normal(size=500) * 1e-7]).astype(np.float32)

    def run(op):
        out = np.empty_like(a)
        kernels.vocabulary.arithmetic(a, b, b, out, len(a), op)
        return out

    assert np.array_equal(run(3), np.fmax(a, b), equal_nan=True)
    assert np.array_equal(run(4), np.fmin(a, b), equal_nan=True)
    assert np.array_equal(run(5), np.ceil(a), equal_nan=True)
    finite = np.abs(a) < 100
    assert np.allclose(run(6)[finite], np.exp2(a[finite].astype(np.float64)), rtol=2.0**-21, atol=2.0**-126)
    positive = (a > 2.0**-126) & np.isfinite(a)
    assert np.allclose(run(7)[positive], np.log2(a[positive].astype(np.float64)), rtol=2.0**-21, atol=2.0**-21)
    total = a.astype(np.float64) + b.astype(np.float64)
    usable = np.isfinite(total) & (np.abs(total) < 3.4e38)
    down = run(8)[usable].astype(np.float64)
    assert (down <= total[usable]).all()
    above = np.nextafter(down.astype(np.float32), np.float32(np.inf)).astype(np.float64)
    assert (above > total[usable]).all()
    words = a.view(np.uint32) | np.uint32(0x80000000)
    assert np.array_equal(run(9), np.log2((words & (~words + np.uint32(1))).astype(np.float64)))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_pack_set_replaces_one_element(kernels, dtype):
    size = 4 if dtype == "fp32" else 8
    words = np.random.default_rng(2).integers(0, 2**32, 4, np.uint32)
    for place in range(size):
        out = words.copy()
        kernels.vocabulary.pack_set(dtype, out, place, -1.5)
        bits = {"bf16": 0xBFC0, "fp16": 0xBE00, "fp32": 0xBFC00000}[dtype]
        expected = words.view(np.uint32 if size == 4 else np.uint16).copy()
        expected[place] = bits
        assert np.array_equal(out.view(expected.dtype), expected)


# ----------------------------------------------------------------------------------------------------------- exchanges


def warp_model(op, values, operands, masks):
    """PTX's shfl.sync, vote.sync: lanes of one mask form a group."""
    out = np.zeros(32, np.uint32)
    for lane in range(32):
        mask, operand = int(masks[lane]), int(operands[lane]) & 31
        votes = sum(1 << other for other in range(32) if mask >> other & 1 and values[other] & 1)
        if mask == 0:
            continue
        source = {
            WarpOp.shuffle: operand,
            WarpOp.shuffle_xor: lane ^ operand,
            WarpOp.shuffle_up: lane - operand if lane >= operand else lane,
            WarpOp.shuffle_down: lane + operand if lane + operand < 32 else lane,
        }.get(op)
        if source is not None:
            if not mask >> source & 1:
                return None  # reads a lane outside the group
            out[lane] = values[source]
        else:
            out[lane] = {WarpOp.ballot: votes, WarpOp.any: votes != 0, WarpOp.all: votes == mask}[op]
    return out


@pytest.mark.parametrize("op", WarpOp, ids=lambda op: op.name)
def test_warp_operations(kernels, simt, op):
    rng = np.random.default_rng(op)
    allowed = refused = 0
    for case in range(300):
        simt.set_options(seed=case)
        values = rng.integers(0, 2**32, 32, dtype=np.uint32)
        if rng.random() < 0.4:
            values |= 1  # so that `all` is true now and then
        # Up to three groups; group 0 stays out.
        groups = rng.integers(0, 4, 32) if case % 2 else np.full(32, 1)
        bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
        masks = np.array([bits[groups == group].sum() if group else 0 for group in groups], np.uint32)
        if case % 3 == 0:
            operands = np.full(32, rng.integers(0, 64), np.uint32)
        elif op == WarpOp.shuffle:  # mostly a member of the own group
            operands = np.array([rng.choice(np.flatnonzero(groups == group)) for group in groups], np.uint32)
        else:
            operands = rng.integers(0, 40, 32, dtype=np.uint32)
        expected = warp_model(op, values, operands, masks)
        out = np.zeros(32, np.uint32)
        if not masks.any():
            continue
        if expected is None:
            refused += 1
            with pytest.raises(simt.Fault, match="which is not in the mask"):
                kernels.vocabulary.warp_op(values, operands, masks, out, op)
        else:
            allowed += 1
            kernels.vocabulary.warp_op(values, operands, masks, out, op)
            assert np.array_equal(out, expected)
    assert allowed > 100
    assert (refused > 0) == op.name.startswith("shuffle")


# ---------------------------------------------------------------------------------------------------------- memory ops


@pytest.mark.parametrize("sys_scope", [False, True], ids=["gpu", "sys"])
@pytest.mark.parametrize("peer", [False, True], ids=["plain_memory", "peer_memory"])
@pytest.mark.parametrize("dtype", [np.uint32, np.uint64], ids=lambda dtype: dtype.__name__)
def test_scoped_memory_operations(kernels, simt, peer_memory, dtype, peer, sys_scope):
    """Every load, store, CAS and add, in random order on few words, is what a single thread expects."""
    rng = np.random.default_rng(0)
    steps, top = 600, np.iinfo(dtype).max
    for seed in range(5):
        simt.set_options(seed=seed)
        ops, which = rng.integers(0, len(MemoryOp), steps, np.int32), rng.integers(0, 3, steps, np.int32)
        a, b = (rng.choice(np.array([0, 1, 2, top], dtype), steps) for _ in range(2))
        memory, results = rng.integers(0, 3, 4).astype(dtype), np.zeros(steps, dtype)
        model, expected = [int(word) for word in memory], []
        for op, word, x, y in zip(ops, which, a.tolist(), b.tolist(), strict=True):
            old = model[word]
            name = MemoryOp(op).name
            if name.startswith("store"):
                model[word] = x
            elif name.startswith("cas") and old == x:
                model[word] = y
            elif name.startswith("add"):
                model[word] = (old + x) & int(top)
            expected.append(0 if name.startswith("store") else old)
        with peer_memory(*([memory] if peer else [])):
            kernels.vocabulary.memory_ops(memory.itemsize, memory, ops, which, a, b, results, steps, sys_scope)
        assert results.tolist() == expected
        assert memory.tolist() == model
        assert set(ops) == set(MemoryOp)
