"""allreduce_rmsnorm_, allreduce_rmsnorm, allreduce_, allreduce, gather_residual_: values, on every kind of ranks."""

from __future__ import annotations

import itertools

import pytest
import torch

from tokenweave_ops import testing
from tokenweave_ops.reference import allreduce_rmsnorm as reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6

# (world_size, dtype, hidden, num_tokens): every pair of values of any two columns stands in some line.
CASES = [
    (1, BF16, 8, 31),
    (1, FP16, 4096, 7),
    (1, FP32, 16384, 1),
    (1, BF16, 6144, 0),
    (1, FP16, 2880, 1000),
    (1, FP32, 7168, 7),
    (2, FP32, 8, 1000),
    (2, BF16, 2880, 31),
    (2, FP16, 5120, 1),
    (2, FP32, 7168, 0),
    (2, BF16, 8192, 7),
    (2, BF16, 4096, 1000),
    (2, FP16, 16384, 31),
    (3, FP16, 8, 7),
    (3, FP32, 4096, 31),
    (3, BF16, 5120, 0),
    (3, FP16, 6144, 1000),
    (3, FP32, 2880, 7),
    (3, BF16, 7168, 1),
    (3, FP32, 8192, 31),
    (4, BF16, 16384, 7),
    (4, FP32, 2880, 0),
    (4, FP16, 8, 1),
    (4, FP16, 7168, 31),
    (4, FP32, 6144, 7),
    (4, BF16, 5120, 1000),
    (4, FP16, 8192, 0),
    (4, BF16, 4096, 7),
    (8, FP32, 5120, 7),
    (8, BF16, 4096, 1),
    (8, FP16, 4096, 0),
    (8, FP16, 2880, 31),
    (8, FP32, 16384, 0),
    (8, BF16, 8, 1000),
    (8, FP32, 8192, 1),
    (8, BF16, 6144, 31),
    (8, FP16, 7168, 1000),
    (2, BF16, 6144, 1),
    (1, BF16, 5120, 31),
    (1, BF16, 8192, 1000),
    (3, BF16, 16384, 1000),
    (1, BF16, 8, 0),
    (1, BF16, 2880, 1),
]


def values(ranks, *shape, dtype, seed):
    """Normal values; for a switch, which adds in any order, small integers, whose sums are exact in every order."""
    generator = torch.Generator().manual_seed(seed)
    if ranks.sums_exactly:
        return torch.randn(*shape, generator=generator).to(dtype).to(ranks.device)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype).to(ranks.device)


def exact_sum(x):
    """round(sum in fp32, rank by rank): the bits the contract asks for."""
    return reference.allreduce(x.float()).to(x.dtype)


def check_norm(y, h, weight, weight_bias=0.0, eps=EPS):
    """y of the call's own h, by the package's rule for tolerances."""
    arguments = (h.cpu(), weight.cpu(), eps)
    exact = reference.rms_norm(arguments[0].double(), arguments[1].double(), eps, weight_bias=weight_bias)
    eager = reference.rms_norm(*arguments, weight_bias=weight_bias)
    testing.assert_close(y, exact, eager, what="y")


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part).removeprefix("torch.") for part in case))
def test_allreduce_rmsnorm(ranks, case):
    world_size, dtype, hidden, num_tokens = case
    if not ranks.affordable(world_size * num_tokens * hidden):
        num_tokens = max(1, 400_000 // (world_size * hidden))
    x = values(ranks, world_size, num_tokens, hidden, dtype=dtype, seed=1)
    start = values(ranks, num_tokens, hidden, dtype=dtype, seed=2)
    weight = values(ranks, hidden, dtype=dtype, seed=3)
    # Each rank has its own rows of the residual; where it is not the owner, NaN shows who read or wrote too much.
    residual = torch.full((world_size, num_tokens, hidden), float("nan"), dtype=dtype, device=ranks.device)
    owned = [reference.owned_rows(num_tokens, world_size, rank) for rank in range(world_size)]
    for rank, rows in enumerate(owned):
        residual[rank, rows] = start[rows]
    with ranks.workspaces(world_size, num_tokens + 3, hidden, dtype) as group:
        # Guard rows behind the tensor: whoever writes past num_tokens writes there.
        guard = group.inside(torch.full((world_size, num_tokens + 3, hidden), 7.0, dtype=dtype, device=ranks.device))
        y = group.allreduce_rmsnorm_(x, residual, weight, eps=EPS, max_ctas=3)
        for rank in range(world_size):
            assert (guard[rank][num_tokens:] == 7).all()
        assert group.pads_are_zero()
    h = torch.empty_like(start)
    for rank, rows in enumerate(owned):
        h[rows] = residual[rank, rows]
        others = torch.ones(num_tokens, dtype=torch.bool)
        others[rows] = False
        assert residual[rank, others].isnan().all(), "rows of other owners must be left alone"
        assert torch.equal(y[rank], y[0]), "all ranks must hold the same bits"
    assert torch.equal(h, (exact_sum(x).float() + start.float()).to(dtype))
    check_norm(y[0], h, weight)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_every_form_gives_the_same(ranks, dtype):
    """allreduce_rmsnorm, its replicated residual, allreduce_, allreduce and gather_residual_ against each other."""
    world_size, num_tokens, hidden = 3, 7, 520
    x = values(ranks, world_size, num_tokens, hidden, dtype=dtype, seed=1)
    start = values(ranks, num_tokens, hidden, dtype=dtype, seed=2)
    weight = values(ranks, hidden, dtype=dtype, seed=3)
    fresh = lambda: start.expand(world_size, -1, -1).clone()  # noqa: E731
    with ranks.workspaces(world_size, num_tokens, hidden, dtype) as group:
        in_place = fresh()
        y = group.allreduce_rmsnorm_(x, in_place, weight, weight_bias=1.0, max_ctas=2)
        staged = fresh()
        functional = group.allreduce_rmsnorm(x, staged, weight, weight_bias=1.0, max_ctas=2)
        replicated, replicated_staged = fresh(), fresh()
        replicated_y = group.allreduce_rmsnorm_(x, replicated, weight, weight_bias=1.0, residual_mode="replicated")
        replicated_functional = group.allreduce_rmsnorm(
            x, replicated_staged, weight, weight_bias=1.0, residual_mode="replicated"
        )
        sums, sums_functional = group.allreduce_(x), group.allreduce(x, max_ctas=1)
        group.gather_residual_(staged, max_ctas=2)
        assert group.pads_are_zero()
    check_norm(y[0], replicated[0], weight, weight_bias=1.0)
    check_norm(replicated_y[0], replicated[0], weight, weight_bias=1.0)
    assert torch.equal(sums, exact_sum(x).expand_as(sums)) and torch.equal(sums_functional, sums)
    assert torch.equal(replicated, (sums.float() + start.float()).to(dtype))
    assert torch.equal(functional, y) and torch.equal(staged, replicated) and torch.equal(replicated_staged, replicated)
    assert torch.equal(replicated_functional, replicated_y)
    for rank in range(world_size):
        rows = reference.owned_rows(num_tokens, world_size, rank)
        assert torch.equal(in_place[rank, rows], replicated[rank, rows])
        assert torch.equal(y[rank], y[0]) and torch.equal(replicated_y[rank], replicated_y[0])


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_sums_in_any_order_are_one_place_off_at_most(ranks, dtype):
    """Of values that do not cancel: then the order of fp32 additions moves the result by one place or not at all."""
    generator = torch.Generator().manual_seed(5)
    x = (torch.rand(4, 16, 256, generator=generator) + 0.5).to(dtype).to(ranks.device)
    with ranks.workspaces(4, 16, 256, dtype) as group:
        sums = group.allreduce_(x)
    exact = x.double().sum(0)
    place = exact.log2().floor().exp2() * torch.finfo(dtype).eps
    # Rounded to nearest: half a place, and for fp32 three additions of which each may be half a place off.
    most = 2.0 if dtype == FP32 else 0.5 + 2.0**-10
    assert ((sums[0].double() - exact).abs() <= most * place).all()
    assert all(torch.equal(sums[rank], sums[0]) for rank in range(4))


def test_the_cases_are_pairwise():
    values = [sorted({case[column] for case in CASES}, key=str) for column in range(4)]
    assert [len(column) for column in values] == [5, 3, 8, 5]
    for one, other in itertools.combinations(range(4), 2):
        seen = {(case[one], case[other]) for case in CASES}
        assert seen == set(itertools.product(values[one], values[other]))


# ------------------------------------------------------------------------------------------------------- golden vectors


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_each_rank_contributes_once(ranks, world_size):
    """Rank r contributes 2^r: a rank that is left out or counted twice shows as its bit."""
    x = torch.ones(world_size, 5, 64, dtype=BF16, device=ranks.device)
    x *= torch.tensor([2.0**rank for rank in range(world_size)], device=ranks.device)[:, None, None]
    with ranks.workspaces(world_size, 5, 64, BF16) as group:
        assert (group.allreduce_(x) == 2.0**world_size - 1).all()


def test_each_row_stays_in_its_place(ranks):
    """Row t comes from rank t % W only, the residual is t: a row that lands in another's place shows."""
    world_size, num_tokens = 4, 30
    t = torch.arange(num_tokens, device=ranks.device)
    x = torch.zeros(world_size, num_tokens, 32, dtype=BF16, device=ranks.device)
    x[t % world_size, t] = 1
    residual = t.to(BF16)[None, :, None].expand(world_size, -1, 32).clone()
    weight = torch.ones(32, dtype=BF16, device=ranks.device)
    with ranks.workspaces(world_size, num_tokens, 32, BF16) as group:
        group.allreduce_rmsnorm_(x, residual, weight, max_ctas=2)
        group.gather_residual_(residual)
    assert torch.equal(residual, (t + 1).to(BF16)[None, :, None].expand_as(residual))


def test_order_of_additions(ranks):
    """Column c holds 2^24, 1, -2^24 at ranks c, c+1, c+2: the fp32 sum depends on the order, which is the ranks'."""
    world_size = 8
    x = torch.zeros(world_size, 3, world_size, dtype=FP32, device=ranks.device)
    for column in range(world_size):
        for step, value in enumerate((2.0**24, 1.0, -(2.0**24))):
            x[(column + step) % world_size, :, column] = value
    with ranks.workspaces(world_size, 3, world_size, FP32) as group:
        sums = group.allreduce_(x)
    if ranks.sums_exactly:
        assert (sums == torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 1], device=ranks.device)).all()
    assert all(torch.equal(sums[rank], sums[0]) for rank in range(world_size))


def test_the_sum_is_rounded_before_the_residual_is_added(ranks):
    """256 + 1 = 257 is 256 in bf16, and 256 + 1 again 256; one rounding at the end would give 258."""
    x = torch.tensor([256.0, 1.0], device=ranks.device)[:, None, None].expand(2, 2, 8).to(BF16)
    residual = torch.ones(2, 2, 8, dtype=BF16, device=ranks.device)
    with ranks.workspaces(2, 2, 8, BF16) as group:
        group.allreduce_rmsnorm_(x, residual, torch.ones(8, dtype=BF16, device=ranks.device))
        group.gather_residual_(residual)
    assert (residual == 256).all()


@pytest.mark.parametrize("hidden", [4096, 6144, 8192])
def test_a_constant_row_gives_one(ranks, hidden):
    x = torch.full((2, 2, hidden), 4.0, dtype=BF16, device=ranks.device)
    with ranks.workspaces(2, 2, hidden, BF16) as group:
        residual = torch.zeros_like(x)
        y = group.allreduce_rmsnorm_(x, residual, torch.ones(hidden, dtype=BF16, device=ranks.device), eps=1e-5)
        assert (y == 1).all()
        cancelling = torch.full_like(x, -8.0)
        zero = group.allreduce_rmsnorm_(x, cancelling, torch.ones(hidden, dtype=BF16, device=ranks.device), eps=1e-5)
        assert (zero == 0).all(), "a zero row is zero, never NaN"


def test_nan_and_infinity_stay_in_their_rows(ranks):
    x = values(ranks, 2, 4, 64, dtype=FP16, seed=1)
    x[1, 1, 5], x[0, 3, 2] = float("nan"), float("inf")
    with ranks.workspaces(2, 4, 64, FP16) as group:
        residual = torch.zeros_like(x)
        y = group.allreduce_rmsnorm_(x, residual, torch.ones(64, dtype=FP16, device=ranks.device))
    assert y[:, 1].isnan().all() and y[:, [0, 2]].isfinite().all()
    assert y[:, 3, 2].isnan().all() and (y[:, 3].nan_to_num() == 0).all()


def test_minus_zero_survives(ranks):
    x = torch.full((2, 2, 8), -0.0, dtype=BF16, device=ranks.device)
    with ranks.workspaces(2, 2, 8, BF16) as group:
        assert group.allreduce_(x).signbit().all()
