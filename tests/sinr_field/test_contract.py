"""What the ops promise besides their values: the same bits for any grid, threads, batch, sweep and machine, the order
of the sums, and which random words a realisation uses."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from math import inf

import pytest
import torch
from sinr_oracle import (
    DB,
    GEOMETRY_NETWORKS,
    OPS,
    POWER_NETWORKS,
    assert_same_bits,
    family,
    geometry_network,
    moved_by_one,
    op_arguments,
    power_network,
    reference,
    sample,
)

from tokenweave_ops import SinrGrid, _library, estimate_from_sums, testing
from tokenweave_ops.sinr_field import BATCH, HISTOGRAM_BINS, HISTOGRAM_LOW, HISTOGRAM_PER_OCTAVE, META_BINS, MOMENTS

DENSITIES = [0.2, 0.9, 1.0, 4.0, 30.0]
THRESHOLDS = [1.0, 2.0, 7.0]
GRID = SinrGrid.make(DENSITIES, THRESHOLDS)
# Every part of each op at work: noise, thinning, residual.
FULL = {
    "sample_power_domain": {"activity": 0.7, "noise": 0.1},
    "sample_geometry": {"activity": 0.7, "noise": 0.1, "num_points": 16},
    "rayleigh_conditional": {"noise": 0.1, "num_points": 16},
}


def network(op: str):
    return power_network("flat") if op == "sample_power_domain" else geometry_network("dual slope")


def run(backend, op: str, grid: SinrGrid = GRID, table=None, **options):
    options = {"num_realisations": 700, "seed": 3, "keep_samples": True, **FULL[op], **options}
    return sample(backend, op, table or network(op), grid, **options)


@contextlib.contextmanager
def emulator_options(**options):
    emulator = testing.host().simt
    saved = emulator.options()
    emulator.set_options(**{**saved, **options})
    try:
        yield
    finally:
        emulator.set_options(**saved)


# ------------------------------------------------------------------------------------------------- the same bits always


@pytest.mark.parametrize("op", OPS)
def test_same_bits_every_run(backend, op):
    first = run(backend, op)
    for _ in range(2):
        assert_same_bits(run(backend, op), first)


@pytest.mark.parametrize("max_grid", [1, 2, 7])
@pytest.mark.parametrize("op", OPS)
def test_same_bits_for_every_grid(simt, op, max_grid):
    expected = run(simt, op, num_realisations=2100)
    with emulator_options(seed=max_grid, max_grid=max_grid):
        assert_same_bits(run(simt, op, num_realisations=2100), expected)


@pytest.mark.parametrize("op", OPS)
def test_same_bits_for_every_schedule(simt, op):
    expected = run(simt, op)
    for seed in range(4):
        with emulator_options(seed=seed, resident_blocks=1 + 3 * seed):
            assert_same_bits(run(simt, op), expected)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("op", OPS)
def test_thread_count_does_not_change_bits(backend, op):
    saved = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(backend, op, num_realisations=40_000))
    finally:
        torch.set_num_threads(saved)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("op", OPS)
def test_densities_together_or_apart(backend, op):
    """Any group of densities, so also those that a kernel walks with."""
    densities = [0.1 * 1.7**i for i in range(13)]
    together = run(backend, op, SinrGrid.make(densities, THRESHOLDS), num_realisations=300)
    for first, last in ((0, 1), (4, 5), (12, 13), (1, 4), (3, 10)):
        apart = run(backend, op, SinrGrid.make(densities[first:last], THRESHOLDS), num_realisations=300)
        assert_same_bits(apart, of_densities(together, slice(first, last)))


def of_densities(result, chosen: slice):
    return result._replace(
        sums=result.sums[:, chosen], histogram=result.histogram[chosen], samples=result.samples[chosen]
    )


@pytest.mark.parametrize("op", OPS)
def test_thresholds_together_or_apart(backend, op):
    thresholds = [1.0 + 0.3 * i for i in range(11)]
    together = run(backend, op, SinrGrid.make(DENSITIES, thresholds), num_realisations=300)
    for chosen in ([0], [10], [7, 3], []):
        apart = run(backend, op, SinrGrid.make(DENSITIES, [thresholds[i] for i in chosen]), num_realisations=300)
        items = chosen
        if op == "rayleigh_conditional":
            assert torch.equal(apart.histogram, together.histogram[:, chosen])
            assert torch.equal(apart.samples, together.samples[:, chosen])
        else:
            items = [*range(len(MOMENTS)), *(len(MOMENTS) + i for i in chosen)]
            assert torch.equal(apart.histogram, together.histogram) and torch.equal(apart.samples, together.samples)
        assert torch.equal(apart.sums, together.sums[:, :, items])


@pytest.mark.parametrize("op", OPS)
def test_a_run_in_parts(backend, op):
    """Batches by themselves, as several devices would do them; the last one is short."""
    grid, num = SinrGrid.make([0.5, 3.0], [2.0]), 2 * BATCH + 300
    options = {"num_points": 4} if op != "sample_power_domain" else {"num_terms": 4, "rate_nodes": 1}
    whole = run(backend, op, grid, num_realisations=num, **options)
    parts = [
        run(backend, op, grid, first_realisation=first, num_realisations=count, **options)
        for first, count in ((0, BATCH), (BATCH, BATCH), (2 * BATCH, 300))
    ]
    last = -1 if op == "rayleigh_conditional" else -2
    joined = whole._replace(
        sums=torch.cat([part.sums for part in parts]),
        histogram=sum(part.histogram for part in parts),
        samples=torch.cat([part.samples for part in parts], dim=last),
    )
    assert_same_bits(joined, whole)


@pytest.mark.parametrize("op", OPS)
def test_a_shorter_run_is_the_beginning_of_a_longer(backend, op):
    longer, last = run(backend, op, num_realisations=1000).samples, -1 if op == "rayleigh_conditional" else -2
    for num in (1, 32, 333, 999):
        assert torch.equal(run(backend, op, num_realisations=num).samples, longer.narrow(last, 0, num))


@pytest.mark.parametrize("op", OPS)
def test_keeping_samples_changes_nothing_else(backend, op):
    kept, other = run(backend, op), run(backend, op, keep_samples=False)
    assert torch.equal(kept.sums, other.sums) and torch.equal(kept.histogram, other.histogram)
    assert other.samples.numel() == 0 and kept.samples.numel() > 0


@pytest.mark.parametrize("op", OPS)
def test_what_does_not_exist_is_not_read(backend, op):
    """Samples go where they belong and nowhere else: results of different sizes, one after the other."""
    expected = {num: run(backend, op, num_realisations=num) for num in (5, 600)}
    for num in (600, 5, 600):
        assert_same_bits(run(backend, op, num_realisations=num), expected[num])


# --------------------------------------------------------------------------------------------------- all machines alike


def fused_multiply_add_reason() -> str | None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "this CPU has no fused multiply-add that the kernels use"
    if os.environ.get("TOKENWEAVE_CPU_ISA") == "baseline":
        return "the CPU kernels were asked not to use fused multiply-add"
    return None


@pytest.mark.parametrize("backend", ["simt", "cuda"], indirect=True)
@pytest.mark.parametrize(
    ("op", "name", "options"),
    [(OPS[0], name, {}) for name in POWER_NETWORKS]
    + [(OPS[0], "3", {"num_terms": 64, "rate_nodes": 0, "residual": "mean"})]
    + [(OPS[0], "100", {"num_terms": 4, "rate_nodes": 16, "residual": "none", "activity": 1.0, "noise": 0.0})]
    + [(OPS[1], name, {}) for name in GEOMETRY_NETWORKS]
    + [(OPS[1], "3", {"num_points": 256, "association": "nearest", "residual": "mean"})]
    + [(OPS[1], "disc", {"association": "nearest", "residual": "none", "activity": 1.0, "noise": 0.0})]
    + [(OPS[2], name, {}) for name in ("4", "dual slope", "height, tabulated", "disc")]
    + [(OPS[2], "3", {"num_points": 32, "association": "strongest"})],
)
def test_same_bits_as_the_cpu(backend, cpu, op, name, options):
    """Sums, histograms and samples."""
    if reason := fused_multiply_add_reason():
        pytest.skip(reason)
    table = power_network(name) if op == "sample_power_domain" else geometry_network(name)
    expected = run(cpu, op, table=table, **options)
    assert_same_bits(run(backend, op, table=table, **options), expected)


@pytest.fixture
def cpu(request):
    if (state := _library.load_library("cpu")) != "loaded":
        pytest.skip(state)
    return type("Cpu", (), {"device": "cpu", "use": staticmethod(lambda family: contextlib.nullcontext())})


ISA_SCRIPT = """
import contextlib, pickle, sys, types
sys.path.insert(0, sys.argv[1])
from test_contract import OPS, run
cpu = types.SimpleNamespace(device="cpu", use=lambda family: contextlib.nullcontext())
sys.stdout.buffer.write(pickle.dumps([[t.numpy() for t in run(cpu, op)[:3]] for op in OPS]))
"""


def test_every_instruction_set():
    """AVX2 and AVX-512 give the same bits, the baseline the same to 2e-5 dB; sets that this machine lacks fall back to
    what it has."""
    found = {}
    processes = {
        isa: subprocess.Popen(
            [sys.executable, "-c", ISA_SCRIPT, os.path.dirname(__file__)],
            env=os.environ | {"TOKENWEAVE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
        )
        for isa in ("baseline", "avx2", "avx512")
    }
    for isa, process in processes.items():
        printed, _ = process.communicate()
        assert process.returncode == 0
        found[isa] = pickle.loads(printed)
    for one, other in zip(found["avx2"], found["avx512"], strict=True):
        assert all((a == b).all() for a, b in zip(one, other, strict=True))
    for op, one, other in zip(OPS, found["baseline"], found["avx2"], strict=True):
        samples = abs(one[2] - other[2])
        assert samples.max() * (1.0 if op == "rayleigh_conditional" else DB) < 2e-5, op
        assert abs(one[1].cumsum(-1) - other[1].cumsum(-1)).max() <= 3, "realisations at the edge of a bin"
        assert abs(one[0] - other[0]).max() <= 1e-5 * abs(other[0]).max() + 3


# ----------------------------------------------------------------------------------------------- sums and histograms


@pytest.mark.parametrize("num", [1, 33, 257, 1025, BATCH + 5])
def test_the_order_of_the_sums(backend, num):
    """Bit for bit what the samples give, added in the order of the contract."""
    result = run(backend, "rayleigh_conditional", num_realisations=num)
    assert torch.equal(result.sums, reference.sums(result.samples))
    assert torch.equal(result.histogram, reference.histogram(result.samples, META_BINS, 0.0, META_BINS))
    if num > 1000:
        in_one_go = result.samples.double().sum(-1)
        assert not torch.equal(result.sums[:, :, :, 0].sum(0), in_one_go), "another order gives other bits"


@pytest.mark.parametrize("association", ["strongest", "nearest"])
def test_coverage_and_histogram_of_geometry_are_those_of_its_samples(backend, association):
    grid = SinrGrid.make(DENSITIES, [0.1, 1.0, 30.0])
    result = run(backend, "sample_geometry", grid, noise=0.0, association=association)
    sinr = result.samples[..., 0] - result.samples[..., 1]
    covered = sinr[:, None] > grid.log2_thresholds[:, None]
    count = covered.double().sum(-1)
    assert torch.equal(result.sums[0, :, len(MOMENTS) :], torch.stack([count, count], dim=-1))
    bins = (HISTOGRAM_BINS, HISTOGRAM_LOW, HISTOGRAM_PER_OCTAVE)
    assert torch.equal(result.histogram, reference.histogram(sinr, *bins))


def test_the_histogram_of_the_power_domain_is_that_of_its_samples(backend):
    result = run(backend, "sample_power_domain", noise=0.0)
    sinr = result.samples[..., 0] - result.samples[..., 1]
    bins = (HISTOGRAM_BINS, HISTOGRAM_LOW, HISTOGRAM_PER_OCTAVE)
    assert torch.equal(result.histogram, reference.histogram(sinr, *bins))
    inverse = torch.exp2(-sinr.double())
    torch.testing.assert_close(result.sums[:, :, 1], reference.sums(inverse), rtol=1e-6, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_estimates(backend, op):
    table = power_network("4") if op == "sample_power_domain" else None
    result = run(backend, op, table=table, num_realisations=BATCH + 700)
    estimates = [result.coverage]
    if op != "rayleigh_conditional":
        estimates += [result.rate, result.inverse_sinr]
        assert result.rate.mean.shape == (len(DENSITIES),)
    assert result.coverage.mean.shape == (len(DENSITIES), len(THRESHOLDS))
    assert all((e.mean > 0).all() and (e.standard_error > 0).all() for e in estimates)
    assert (result.coverage.mean <= 1).all() and (result.coverage.mean.diff(dim=-1) < 0).all()
    if op == "rayleigh_conditional":
        values = result.samples.double()
        torch.testing.assert_close(result.coverage.mean, values.mean(-1))
        torch.testing.assert_close(result.coverage.standard_error, values.std(-1) / values.shape[-1] ** 0.5)


def test_estimate_from_sums():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    sums = torch.stack([values, values**2], dim=-1).double()[:, None]  # four batches of one realisation
    mean, error = estimate_from_sums(sums, 4)
    assert mean.item() == 4.0 and error.item() == pytest.approx(values.std().item() / 2)
    assert estimate_from_sums(sums[:1], 1).standard_error.item() == inf  # not known
    mean, error = estimate_from_sums(torch.tensor([[[inf, inf]], [[1e200, inf]]]).double(), 2)
    assert mean.item() == inf and error.item() == inf


# -------------------------------------------------------------------------------------------------------- random words


@pytest.mark.parametrize("op", OPS)
def test_seeds_and_realisations_differ(backend, op):
    base = run(backend, op, num_realisations=64).samples
    others = [
        run(backend, op, num_realisations=64, **change).samples
        for change in (
            {"seed": 4},
            {"seed": 3 + 2**32},
            {"seed": -3},
            {"first_realisation": BATCH},
            {"first_realisation": 2**32},
        )
    ]
    for other in others:
        assert (other != base).double().mean() > 0.9
    assert torch.equal(run(backend, op, num_realisations=64, seed=3).samples, base)


def test_streams_are_apart(backend):
    """What does not use a stream does not change with it: thinning, marks, residual."""
    options = {"num_realisations": 200, "noise": 0.0, "residual": "none"}
    full, thinned = (run(backend, "sample_power_domain", activity=a, **options) for a in (1.0, 0.5))
    assert torch.equal(full.samples[..., 0], thinned.samples[..., 0]), "the signal has no activity"
    assert (thinned.samples[..., 1] <= full.samples[..., 1] + 1e-6).all()
    gauss = run(backend, "sample_power_domain", **{**options, "residual": "gauss"}, activity=1.0)
    assert torch.equal(full.samples[..., 0], gauss.samples[..., 0])
    nearest = [
        run(backend, "sample_geometry", table=geometry_network(name), association="nearest", **options)
        for name in ("4", "no fading")
    ]
    assert not torch.equal(nearest[0].samples[..., 0], nearest[1].samples[..., 0]), "marks"


def test_the_generator():
    """The reference's generator is Random123's: its published answers."""
    counter = torch.tensor([[0, 0, 0, 0], [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]])
    zero = reference.philox4x32_10(counter[:1], 0)
    assert [f"{word:08x}" for word in zero[0].tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    pi = reference.philox4x32_10(counter[1:], 0x299F31D0A4093822)
    assert [f"{word:08x}" for word in pi[0].tolist()] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


# ---------------------------------------------------------------------------------------------------- memory, launches


@pytest.mark.parametrize("op", OPS)
def test_a_grid_anywhere_in_memory(backend, op):
    """Scales and thresholds, and the lines of a gain, that begin at any fp32 number, as slices of others do."""
    given = op_arguments(op, network(op).to(backend.device), GRID.to(backend.device), keep_samples=True, **FULL[op])
    expected = getattr(backend.ops, op)(*given.values())
    for name in {"scales", "thresholds", "gain"} & given.keys():
        given[name] = moved_by_one(given[name])
    for one, other in zip(getattr(backend.ops, op)(*given.values()), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("num_realisations", [1, 256, 257, 2**17 + 1, 2**30])
@pytest.mark.parametrize("num_densities", [1, 2, 3, 1024])
def test_plans(host, num_densities, num_realisations):
    """Every cell of every group has a warp; the grid never exceeds the tiles or what a launch may have."""
    cells = -(-num_realisations // 256)
    for intervals in (2, 2048, 2049, 8192):
        plans = [
            host.plan_sample_power_domain(num_densities, num_realisations, intervals),
            host.plan_sample_geometry(num_densities, num_realisations, intervals),
        ]
        for plan in plans:
            assert plan.intervals >= intervals
            assert plan.num_tiles == plan.tiles_per_group * -(-num_densities // plan.densities)
    plans += [host.plan_rayleigh_conditional(num_densities, t, num_realisations) for t in (1, 8, 9, 1024)]
    assert plans[-1].num_tiles == plans[-1].tiles_per_group * num_densities * 128
    plans.append(host.plan_sample_power_domain(num_densities, num_realisations, 100, max_grid=3))
    assert plans[-1].grid <= 3
    for plan in plans:
        warps = plan.block_x // 32
        assert cells <= plan.tiles_per_group * warps < cells + warps
        assert 1 <= plan.grid <= min(plan.num_tiles, 2**31 - 1)


def test_graph_capture(cuda):
    tables = {op: network(op).to("cuda") for op in OPS}
    grid = GRID.to("cuda")
    for op in OPS:
        options = {"num_realisations": 700, "seed": 3, "keep_samples": True, **FULL[op]}
        expected = getattr(family, op)(tables[op], grid, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = getattr(family, op)(tables[op], grid, **options)
        for _ in range(2):
            graph.replay()
            assert_same_bits(result, expected)
