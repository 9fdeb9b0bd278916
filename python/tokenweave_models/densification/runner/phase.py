"""Exponents of coverage or rate, fitted over near-field exponent and tail index, beside what theory says."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import inf

import numpy as np

from tokenweave_models.common.console import print_table, print_text, progress
from tokenweave_models.common.errors import UserError
from tokenweave_models.common.output import check_output
from tokenweave_models.densification import units
from tokenweave_models.densification.fading import Pareto, Rayleigh
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.path_loss import MultiSlope
from tokenweave_models.densification.result import Slope
from tokenweave_models.densification.runner import options, plots
from tokenweave_models.densification.runner.reporting import plain, write_report, written
from tokenweave_models.densification.sweep import sweep

BREAKPOINT_M = 10.0
RADIUS_M = 40e3


@dataclass(frozen=True)
class Cell:
    near_exponent: float
    tail_index: float
    regime: str
    rho: float
    slope: Slope


def run(arguments: argparse.Namespace) -> None:
    check_output(arguments.json)
    options.check_plot(arguments.plot)
    if not 2 < arguments.far_exponent < inf:
        raise UserError(f"--far-exponent must be above 2 and finite, got {arguments.far_exponent:g}")
    near = numbers_of("--near-exponents", arguments.near_exponents, least=0.0, most=arguments.far_exponent)
    tails = numbers_of("--tail-indices", arguments.tail_indices, least=1e-3, most=inf)
    densities = units.parse_densities(arguments.densities)
    threshold_db = units.parse_thresholds(arguments.threshold, field="--threshold")
    if len(threshold_db) != 1:
        raise UserError(f"--threshold must be one number with its unit, got {arguments.threshold!r}")
    if densities.max() < 99 * densities.min() or len(densities) < 3:
        raise UserError(f"--densities must be at least 3 over two decades, got {arguments.densities!r}")
    settings, device = options.settings_of(arguments, "power"), options.device_of(arguments.device)
    cells = []
    with options.refused_in_words(), progress() as bar:
        task = bar.add_task("sweeps", total=len(near) * len(tails))
        for tail_index in tails:
            for near_exponent in near:
                network = network_at(near_exponent, tail_index, arguments.far_exponent)
                common = {"num_realisations": arguments.n, "seed": arguments.seed, "device": device}
                cells.append(
                    fit(network, densities, threshold_db, arguments.quantity, settings=settings, **common)
                )  # fmt: skip
                bar.advance(task)
    print_cells(arguments, near, tails, cells)
    write_report(
        arguments.json,
        {
            "quantity": arguments.quantity,
            "cells": [vars(cell) | {"slope": vars(cell.slope)} for cell in cells],
            "provenance": options.provenance_of(arguments),
        },
    )
    if arguments.plot is not None:
        plots.draw_phase(arguments.plot, cells)
        written(arguments.plot)


def numbers_of(field: str, text: str, least: float, most: float) -> list[float]:
    words = text.split(",")
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if not numbers or not all(least <= number <= most for number in numbers) or sorted(set(numbers)) != numbers:
        raise UserError(f"{field} must be ascending numbers from {least:g} to {most:g}, with commas, got {text!r}")
    return numbers


def network_at(near_exponent: float, tail_index: float, far_exponent: float) -> Network:
    """In a disc, so that every tail has its finite interference."""
    if near_exponent < far_exponent:
        law = MultiSlope([near_exponent, far_exponent], [BREAKPOINT_M], r_inf_m=RADIUS_M)
    else:
        law = MultiSlope([far_exponent], r_inf_m=RADIUS_M)
    return Network(law, Rayleigh() if tail_index == inf else Pareto(tail_index))


def fit(network: Network, densities, threshold_db, quantity: str, **given) -> Cell:
    """The slope over the last two decades."""
    result = sweep(network, densities, threshold_db, rate=quantity == "rate", **given)
    (slope,) = [one for one in result.slopes() if one.quantity == quantity]
    regime = result.regime
    law = network.path_loss
    return Cell(law.near_exponent, network.fading.tail_index, regime.name, regime.rho, slope)


def print_cells(arguments: argparse.Namespace, near: list[float], tails: list[float], cells: list[Cell]) -> None:
    by_place = {(cell.near_exponent, cell.tail_index): cell for cell in cells}
    what = arguments.quantity + (f" at {arguments.threshold}" if arguments.quantity == "coverage" else "")
    print_table(
        f"Exponent of {what}: fitted (predicted), {arguments.densities}, {arguments.n} realisations",
        ("tail index alpha", *(f"beta_0 = {value:g}" for value in near)),
        [(f"{tail:g}", *(words_of(by_place[value, tail].slope) for value in near)) for tail in tails],
    )
    judged = [cell for cell in cells if cell.slope.verdict in ("agrees", "differs")]
    apart = [cell for cell in judged if cell.slope.verdict == "differs"]
    print_text(f"{len(judged) - len(apart)} of {len(judged)} cells with a predicted power agree with it.")
    for cell in apart:
        print_text(
            f"  beta_0 = {cell.near_exponent:g}, alpha = {cell.tail_index:g}, rho = {cell.rho:.4g}: "
            f"{cell.slope.value:.4f} instead of {cell.slope.predicted:.4g}; its limit is not reached yet"
        )


def words_of(slope: Slope) -> str:
    fitted = "-" if np.isnan(slope.value) else f"{slope.value:.3f}"
    return f"{fitted} ({plain(slope.predicted)})"
