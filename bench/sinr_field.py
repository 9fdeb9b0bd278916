"""Benchmarks of family sinr_field. A call is a number of realisations, and what it gives are statistics: a contestant
is right when each of its means is off the exact one by no more than 5 standard errors and the bias that its formulation
states. `max_err` is the largest share of that which was used.

A row's flops count the work that ours asks of every lane, by hand, from csrc/sinr_field: each operation, integer or
floating, fused or not, takes one slot of the arithmetic units as a multiply-add does, and counts 2 as that would in a
matmul. So the share of the measured fp32 matmul rate is a share of the slots. Loads, and what an instruction set needs
beyond (a product of 32-bit words takes several instructions on a CPU), are not counted.
"""

from __future__ import annotations

from functools import partial
from math import ceil

import numpy as np
import torch
from tokenweave_models.densification.benchmark import window_loop

import tokenweave_ops
from bench import sinr_formulations as formulations
from bench.harness import RETURNED, Case, Contestant
from bench.machines import Buffer, Limit
from bench.sinr_formulations import Problem
from tokenweave_ops import SinrGrid
from tokenweave_ops.sinr_field import BATCH, MOMENTS

FAMILY = "sinr_field"
THRESHOLDS_40 = tuple(10 ** (db / 10) for db in range(-10, 30))
THRESHOLDS_8 = tuple(10 ** (db / 10) for db in range(-10, 14, 3))
THRESHOLDS_8_HIGH = tuple(10 ** (db / 10) for db in range(0, 24, 3))  # the strongest cell needs at least 1
SWEEP_PER_KM2 = tuple(np.geomspace(1e-1, 1e6, 29).tolist())
WINDOW_STATIONS = 256
GPU_SCALE = 64  # realisations of a case on a GPU, for one on a CPU
BIAS = 1e-3  # of the algorithms at 16 powers and more, tables included
WINDOW_BIAS = 1e-2  # of the window simulation at 256 stations: coverage is off by 2e-3, the rate by 6e-3

# Slots for each lane (see above): a random word of Philox; an exponential deviate with the running sum; the place of a
# word among quantiles; 2^x; lookups.
WORD, EXPONENTIAL, QUANTILE, EXP2, LOG2, LOOKUP, TWO_SIDED_LOOKUP, RATE, EXP2_WIDE = 20, 31, 6, 13, 20, 11, 17, 41, 24
SUMS = 6  # value and square, in float64
WALK = 4 * WORD + 42 + 22  # the residual's words and deviate, log2 of the second arrival
FINISH = 2 * LOOKUP + 2 * EXP2 + 38 + 39 + RATE + EXP2_WIDE + 33  # residual, total with noise, moments, histogram
CONDITIONAL_FINISH = 2 * EXP2 + EXP2_WIDE + LOG2 + 28


def cases(device: str, quick: bool) -> list[Case]:
    scale = 1 if device == "cpu" else GPU_SCALE
    power = [
        _power_case("16 powers", device, 4 * scale),
        _power_case("16 powers, 40 thresholds", device, scale, thresholds=THRESHOLDS_40),
        _power_case("29 densities", device, scale, sweep=SWEEP_PER_KM2, thresholds=(1.0,), rate_nodes=4, loop=False),
        _power_case("1 per km2", device, 4 * scale, sweep=(1.0,), thresholds=(1.0,), loop=False),
        _power_case("1e6 per km2", device, 4 * scale, sweep=(1e6,), thresholds=(1.0,), loop=False),
    ]
    geometry = [
        _geometry_case("256 stations", device, scale),
        _geometry_case("256 stations, 16 densities", device, scale, num_densities=16, loop=False),
        _geometry_case("256 stations, nearest", device, scale, association="nearest"),
    ]
    conditional = [
        _conditional_case("64 stations, nearest", device, scale, 64, "nearest", THRESHOLDS_8),
        _conditional_case("32 stations, strongest", device, scale, 32, "strongest", THRESHOLDS_8_HIGH),
    ]
    return [power[0], geometry[0]] if quick else [*power, *geometry, *conditional]


# --- one case of each sampler -----------------------------------------------------------------------------------------


def _power_case(
    name: str,
    device: str,
    batches: int,
    *,
    thresholds: tuple[float, ...] = (),
    sweep: tuple[float, ...] | None = None,
    rate_nodes: int = 0,
    num_terms: int = 16,
    loop: bool = True,
) -> Case:
    """Without a sweep one slope, whose answer no density changes; with one two slopes and its densities per km^2."""
    if sweep:
        found = formulations.two_slopes(sweep, thresholds, SWEEP_PER_KM2, device)
        densities, table, exact = tuple(found[0].tolist()), found[1], found[2]
    else:
        densities, table = (1.0,), formulations.single_slope_power_table(device)
        exact = formulations.single_slope_exact(thresholds, nearest=False, has_rate=True, densities=1)
    problem = Problem(
        densities, thresholds, batches * BATCH, num_terms, exact, rate_nodes=rate_nodes, is_single_slope=sweep is None
    )
    grid = SinrGrid.make(densities, thresholds, device)
    call = partial(
        tokenweave_ops.sample_power_domain, table, grid, num_realisations=problem.num_realisations,
        num_terms=num_terms, rate_nodes=rate_nodes,
    )  # fmt: skip
    walks = _walks(len(densities))
    realisation = FINISH + rate_nodes * (RATE + LOOKUP + 13) + len(thresholds) * (TWO_SIDED_LOOKUP + EXP2_WIDE + 9)
    slots = walks * (num_terms * (WORD + EXPONENTIAL) + WALK)
    slots += len(densities) * (num_terms * (LOOKUP + EXP2 + 10) + realisation)
    op = "sample_power_domain"
    return _case(op, name, problem, call, slots, device, formulations.power_curves(problem, table, device), loop)


def _geometry_case(
    name: str,
    device: str,
    batches: int,
    *,
    num_densities: int = 1,
    association: str = "strongest",
    num_points: int = 256,
    loop: bool = True,
) -> Case:
    densities, nearest = tuple(np.geomspace(0.1, 100, num_densities).tolist()), association == "nearest"
    exact = formulations.single_slope_exact(THRESHOLDS_8, nearest, has_rate=True, densities=num_densities)
    problem = Problem(densities, THRESHOLDS_8, batches * BATCH, num_points, exact, nearest=nearest)
    table, grid = formulations.single_slope_geometry_table(device), SinrGrid.make(densities, THRESHOLDS_8, device)
    call = partial(
        tokenweave_ops.sample_geometry, table, grid, num_realisations=problem.num_realisations, num_points=num_points,
        association=association,
    )  # fmt: skip
    shared = 2 * WORD + EXPONENTIAL + QUANTILE + LOOKUP  # of a station: arrival and mark
    station = LOG2 + 6 + EXP2 + (7 if nearest else 10)  # gain, and its place among signal and interference
    slots = _walks(num_densities) * (num_points * shared + WALK)
    slots += num_densities * (num_points * station + FINISH + len(THRESHOLDS_8) * (4 + SUMS))
    return _case("sample_geometry", name, problem, call, slots, device, {}, loop)


def _conditional_case(name, device, batches, num_points, association, thresholds) -> Case:
    nearest, wide = association == "nearest", len(thresholds)
    exact = formulations.single_slope_exact(thresholds, nearest, has_rate=False, densities=1)
    problem = Problem((1.0,), thresholds, batches * BATCH, num_points, exact, has_rate=False, nearest=nearest)
    table, grid = formulations.single_slope_geometry_table(device), SinrGrid.make((1.0,), thresholds, device)
    call = partial(
        tokenweave_ops.rayleigh_conditional, table, grid, num_realisations=problem.num_realisations,
        num_points=num_points, association=association,
    )  # fmt: skip
    slots = num_points * (WORD + EXPONENTIAL + LOG2 + 9) + wide * (SUMS + 4)
    servers = 1 if nearest else num_points
    product = 2 + (3 if nearest else 6)  # one factor, with the exponent split off at every other one or at each
    slots += servers * (num_points * (EXP2 + 4 + product * wide) + CONDITIONAL_FINISH * wide)
    return _case("rayleigh_conditional", name, problem, call, slots, device, {}, loop=True)


def _walks(densities: int) -> int:
    """Walks over arrivals that serve so many densities: groups of 8, 4, 2 and 1."""
    return densities // 8 + (densities % 8).bit_count()


# --- contestants ------------------------------------------------------------------------------------------------------


def _our_sums(problem: Problem, found) -> torch.Tensor:
    sums = found.sums.sum(0)  # of the batches
    return torch.cat([sums[:, :1], sums[:, len(MOMENTS) :]], dim=1) if problem.has_rate else sums


def _case(op: str, name: str, problem: Problem, ours, slots: int, device: str, curves: dict, loop: bool) -> Case:
    outputs = {"off": RETURNED}

    def contestant(contestant_name: str, formulation: str, make, bias: float = BIAS, sums_of=lambda found: found):
        ready = None

        def bind(buffers):
            nonlocal ready
            ready = ready or make()
            return ready

        judged = partial(formulations.judge, problem, bias)
        return Contestant(contestant_name, formulation, bind, outputs, result=lambda found: judged(sums_of(found)))

    contestants = [contestant("tokenweave", f"tokenweave_ops.{op}", lambda: ours, sums_of=partial(_our_sums, problem))]
    skipped = {}
    for peer in formulations.peers(op, problem, device, curves):
        contestants.append(contestant(peer.name, f"{peer.formulation}; bias up to {BIAS:g}", peer.make))
    if device == "cuda":
        skipped["numpy"] = "it runs on the host"
    elif loop:
        text = f"one realisation at a time, {WINDOW_STATIONS} stations on average in a disc, nothing beyond"
        text += f"; bias up to {WINDOW_BIAS:g}"
        contestants.append(contestant("numpy_loop", text, partial(_loop, problem), WINDOW_BIAS))
    else:
        skipped["numpy_loop"] = "its time grows with densities; see the case of one density"
    densities, n = len(problem.densities), problem.num_realisations
    taken = "station" if op != "sample_power_domain" else "power"
    return Case(
        family=FAMILY, op=op, case=name, dtype=torch.float32,
        buffers={"densities": Buffer((densities,), torch.float32, partial(_fill, problem))},
        contestants=contestants,
        reference=lambda inputs: {"off": torch.zeros(densities, problem.items)},
        tolerance=1.0,
        bytes=16 * (problem.items + (2 if problem.has_rate else 0)) * densities * ceil(n / 256),  # sums of cells
        flops=2 * slots * n,
        limit=Limit("matmul", ("densities",)), independent_rows=False,
        counts={"realisation": n * densities, taken: n * densities * problem.count},
    )  # fmt: skip


def _fill(problem: Problem, tensor: torch.Tensor, generator: torch.Generator) -> None:
    tensor.copy_(torch.tensor(problem.densities))


def _loop(problem: Problem):
    rng, thresholds = np.random.default_rng(20), np.array(problem.thresholds)

    def call():
        totals = window_loop(
            formulations.EXPONENT, WINDOW_STATIONS, thresholds, problem.num_realisations, rng, nearest=problem.nearest
        )
        return totals[None, 0 if problem.has_rate else 1 :]

    return call
