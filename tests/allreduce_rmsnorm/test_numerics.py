"""Results against float64: sizes, dtypes, golden vectors, special values, gradients."""

from __future__ import annotations

import pytest
import torch

from tokenweave_ops import testing
from tokenweave_ops.reference import allreduce_rmsnorm as reference

family = testing.family("allreduce_rmsnorm")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]

# (num_tokens, hidden): every path of the launch plan, sizes around a vector, a warp and a tile, and real ones.
SHAPES = [
    (1, 1),
    (7, 7),
    (31, 8),
    (5, 31),
    (7, 64),
    (9, 128),
    (3, 256),
    (2, 520),
    (2, 1000),
    (2, 2880),
    (3, 4096),
    (1, 5123),
    (2, 8192),
    (1, 16384),
    (1, 32768),
    (1, 65536),
]


def make_inputs(backend, num_tokens, hidden, dtype, scale=1.0):
    x = backend.tensor(num_tokens, hidden, dtype=dtype, seed=1, scale=scale)
    residual = backend.tensor(num_tokens, hidden, dtype=dtype, seed=2, scale=scale)
    weight = backend.tensor(hidden, dtype=dtype, seed=3)
    return x, residual, weight


def assert_within_ulps(actual, exact, ulps):
    """Element by element: |actual - exact| is at most ``ulps`` units in the last place of exact."""
    info = torch.finfo(actual.dtype)
    spacing = exact.abs().clamp(min=info.tiny).log2().floor().exp2() * info.eps
    distance = (actual.double() - exact).abs() / spacing
    assert distance.max().item() <= ulps, f"off by {distance.max().item():.2f} ulp"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_add_rms_norm_matches_float64(backend, shape, dtype):
    weight_bias = 1.0 if shape[0] % 2 else 0.0  # on vector and scalar paths alike
    x, residual, weight = make_inputs(backend, *shape, dtype)
    eager_y, eager_h = reference.add_rms_norm(x.cpu(), residual.cpu(), weight.cpu(), weight_bias=weight_bias)
    exact_y, _ = reference.add_rms_norm(
        x.cpu().double(), residual.cpu().double(), weight.cpu().double(), weight_bias=weight_bias
    )
    with backend.use(family):
        family.add_rms_norm_(x, residual, weight, weight_bias=weight_bias)
    assert torch.equal(residual.cpu(), eager_h), "h must be the once-rounded sum, bit for bit"
    testing.assert_close(x, exact_y, eager_y, what="y")

    # The stricter half of the contract: against its own h, y is one fp32 computation and one rounding.
    own_y = reference.rms_norm(residual.cpu().double(), weight.cpu().double(), weight_bias=weight_bias)
    assert_within_ulps(x.cpu(), own_y, ulps=1.0 if dtype != torch.float32 else 8.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (6, 128), (2, 4096), (1, 65536)], ids=str)
@pytest.mark.parametrize("with_out", [False, True], ids=["new", "out"])
def test_rms_norm_matches_float64(backend, shape, dtype, with_out):
    x, _, weight = make_inputs(backend, *shape, dtype)
    out = torch.full_like(x, float("nan")) if with_out else None
    with backend.use(family):
        y = family.rms_norm(x, weight, 1e-5, weight_bias=float(with_out), out=out)
    assert (y is out) == with_out
    exact = reference.rms_norm(x.cpu().double(), weight.cpu().double(), 1e-5, weight_bias=float(with_out))
    eager = reference.rms_norm(x.cpu(), weight.cpu(), 1e-5, weight_bias=float(with_out))
    testing.assert_close(y, exact, eager, what="y")


def test_rounding_probe(backend):
    """256 + 1 is a tie in bf16 and rounds to the even 256 before the norm sees it."""
    x = torch.full((1, 64), 256.0, dtype=torch.bfloat16, device=backend.device)
    residual = torch.ones_like(x)
    with backend.use(family):
        family.add_rms_norm_(x, residual, torch.ones(64, dtype=torch.bfloat16, device=backend.device))
    assert (residual == 256.0).all()
    assert (x == 1.0).all()


@pytest.mark.parametrize("hidden", [4096, 6144, 8192])
def test_constant_row_gives_exactly_one(backend, hidden):
    x = torch.full((2, hidden), 8.0, dtype=torch.bfloat16, device=backend.device)
    residual = torch.zeros_like(x)
    with backend.use(family):
        family.add_rms_norm_(x, residual, torch.ones(hidden, dtype=torch.bfloat16, device=backend.device), 1e-5)
    assert (x == 1.0).all() and (residual == 8.0).all()


@pytest.mark.parametrize("hidden", [33, 512])
def test_zero_row_gives_exactly_zero(backend, hidden):
    x = backend.tensor(2, hidden, dtype=torch.float16)
    residual = -x
    with backend.use(family):
        family.add_rms_norm_(x, residual, torch.ones(hidden, dtype=torch.float16, device=backend.device))
    assert (x == 0).all() and (residual == 0).all()


@pytest.mark.parametrize("hidden", [40, 4096])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_row(backend, hidden, special):
    x, residual, weight = make_inputs(backend, 3, hidden, torch.bfloat16)
    clean_x, clean_residual = x.clone(), residual.clone()
    x[1, 5] = special
    exact, _ = reference.add_rms_norm(x.cpu().double(), residual.cpu().double(), weight.cpu().double())
    with backend.use(family):
        family.add_rms_norm_(x, residual, weight)
        family.add_rms_norm_(clean_x, clean_residual, weight)
    assert torch.equal(x.cpu().isnan(), exact.isnan()), "NaN stands where float64 has it"
    assert torch.equal(x[::2], clean_x[::2]), "other rows keep their bits"
    if special == special:  # an infinity: rstd is 0, so everything else in the row is 0
        assert (x[1].cpu()[~exact[1].isnan()] == 0).all()


def test_squares_overflow_in_fp32_as_documented(backend):
    x = torch.full((1, 64), 1e25, dtype=torch.bfloat16, device=backend.device)
    with backend.use(family):
        y = family.rms_norm(x, torch.ones(64, dtype=torch.bfloat16, device=backend.device))
    assert (y == 0).all()


@pytest.mark.parametrize("hidden", [63, 64])
def test_subnormals_are_not_flushed(backend, hidden):
    """h keeps bf16's subnormals, and with eps = 0 a row of fp16's smallest number normalises to its signs."""
    x = torch.full((1, hidden), 2.0**-130, dtype=torch.bfloat16, device=backend.device)
    residual = x * -3
    tiny = torch.full((1, hidden), 2.0**-24, dtype=torch.float16, device=backend.device)
    tiny[0, ::2] *= -1
    with backend.use(family):
        family.add_rms_norm_(x, residual, torch.ones(hidden, dtype=torch.bfloat16, device=backend.device))
        y = family.rms_norm(tiny, torch.ones(hidden, dtype=torch.float16, device=backend.device), 0.0)
    assert (residual.cpu().double() == -(2.0**-129)).all()
    assert torch.equal(y.cpu(), tiny.cpu().sign())


@pytest.mark.parametrize("hidden", [8192, 65536])
def test_rows_far_from_zero_keep_their_digits(backend, hidden):
    """All squares equal: the worst case for adding them up one after the other."""
    x = torch.full((1, hidden), 1.1, device=backend.device)
    with backend.use(family):
        y = family.rms_norm(x, torch.ones(hidden, device=backend.device))
    exact = reference.rms_norm(x.cpu().double(), torch.ones(hidden, dtype=torch.float64))
    assert_within_ulps(y.cpu(), exact, ulps=4.0)


# ------------------------------------------------------------------------------------------------------------ gradients


def gradients(function, inputs, grad_outputs):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.autograd.grad(outputs, leaves, grad_outputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (67, 40), (130, 9), (3, 4096)], ids=str)
def test_add_rms_norm_train_gradients(backend, shape, dtype):
    inputs = make_inputs(backend, *shape, dtype)
    grad_outputs = (backend.tensor(*shape, dtype=dtype, seed=4), backend.tensor(*shape, dtype=dtype, seed=5))

    def run(function, inputs, grads):
        return gradients(
            lambda x, residual, weight: function(x, residual, weight, 1e-5, weight_bias=1.0), inputs, grads
        )

    with backend.use(family):
        actual = run(family.add_rms_norm_train, inputs, grad_outputs)
    on_cpu = [tensor.cpu() for tensor in (*inputs, *grad_outputs)]
    # h is rounded in the forward pass; the gradient at the rounded h is what the kernel must return.
    h = (on_cpu[0] + on_cpu[1]).double()
    exact = run(reference.add_rms_norm, [h, torch.zeros_like(h), on_cpu[2].double()], [g.double() for g in on_cpu[3:]])
    eager = run(reference.add_rms_norm, on_cpu[:3], on_cpu[3:])
    for name, got, want, other in zip(("grad_x", "grad_residual", "grad_weight"), actual, exact, eager, strict=True):
        testing.assert_close(got, want, other, what=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_train_gradients(backend, dtype):
    x, _, weight = make_inputs(backend, 6, 72, dtype)
    grad_y = backend.tensor(6, 72, dtype=dtype, seed=4)
    with backend.use(family):
        actual = gradients(lambda x, weight: family.rms_norm_train(x, weight, 1e-5), (x, weight), (grad_y,))
    on_cpu = [tensor.cpu() for tensor in (x, weight, grad_y)]
    exact = gradients(
        lambda x, weight: reference.rms_norm(x, weight, 1e-5), [t.double() for t in on_cpu[:2]], [on_cpu[2].double()]
    )
    eager = gradients(lambda x, weight: reference.rms_norm(x, weight, 1e-5), on_cpu[:2], on_cpu[2:])
    for name, got, want, other in zip(("grad_x", "grad_weight"), actual, exact, eager, strict=True):
        testing.assert_close(got, want, other, what=name)


def test_only_h_used_gives_identity_gradient(backend):
    """If the loss sees h alone, the norm's gradient is zero and grad_h passes through unchanged."""
    x, residual, weight = (tensor.requires_grad_() for tensor in make_inputs(backend, 4, 16, torch.float32))
    with backend.use(family):
        _, h = family.add_rms_norm_train(x, residual, weight)
        grads = torch.autograd.grad(h.sum(), (x, residual, weight), allow_unused=True)
    assert torch.equal(grads[0], torch.ones_like(x)) and torch.equal(grads[1], torch.ones_like(x))
    assert (grads[2] == 0).all()


def test_a_second_derivative_is_refused(backend):
    x, residual, weight = (tensor.requires_grad_() for tensor in make_inputs(backend, 4, 16, torch.float32))
    with backend.use(family):
        y, _ = family.add_rms_norm_train(x, residual, weight)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="rms_norm_train is differentiable once"):
            torch.autograd.grad(grad.square().sum(), x)


def test_train_forward_has_the_inference_bits(backend):
    x, residual, weight = make_inputs(backend, 5, 264, torch.bfloat16)
    with backend.use(family):
        y, h = family.add_rms_norm_train(x, residual, weight)
        assert torch.equal(family.rms_norm_train(x, weight), family.rms_norm(x, weight))
        family.add_rms_norm_(x, residual, weight)
    assert torch.equal(y, x) and torch.equal(h, residual)
