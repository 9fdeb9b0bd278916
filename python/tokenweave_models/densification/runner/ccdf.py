"""The distribution of the SINR at some densities, or of the coverage of a cell over geometries."""

from __future__ import annotations

import argparse

import numpy as np

from tokenweave_models.common.console import print_table, print_text
from tokenweave_models.common.errors import UserError
from tokenweave_models.densification import units
from tokenweave_models.densification.exact import saturation
from tokenweave_models.densification.result import Result
from tokenweave_models.densification.runner import options, plots
from tokenweave_models.densification.runner.reporting import (
    plain,
    print_regime_words,
    print_result,
    shown_columns,
    title_of,
    written,
)
from tokenweave_models.densification.runner.sampling import save, sweep_with_bar

LEVELS = (0.05, 0.5, 0.95)
LIMIT_DB = np.arange(-30.0, 300.0, 0.25)  # below, no saturation law has anyone; above, one of tiny rho still has some
RELIABILITIES = (0.1, 0.5, 0.9, 0.95, 0.99)


def run(arguments: argparse.Namespace) -> None:
    options.check_results(arguments.out, arguments.plot)
    network = options.network_of(arguments)
    densities = units.parse_densities(arguments.densities)
    thresholds_db = units.parse_thresholds(arguments.thresholds)
    method = "conditional" if arguments.meta and arguments.method == "auto" else arguments.method
    method = options.method_of(network, method, rate=False)
    if arguments.meta and method != "conditional":
        raise UserError("--meta needs --method conditional, whose realisations are geometries")
    result = sweep_with_bar(
        "sampling",
        network,
        densities,
        thresholds_db,
        num_realisations=arguments.n,
        method=method,
        rate=False,
        settings=options.settings_of(arguments, method),
        seed=arguments.seed,
        device=options.device_of(arguments.device),
        **options.provenance_of(arguments),
    )
    print_result(f"{title_of(network)}, {arguments.n} realisations", result)
    if arguments.meta:
        print_meta(result)
    else:
        print_levels(result)
    print_regime_words(result)
    save(result, arguments.out)
    if arguments.plot is not None:
        if arguments.meta:
            plots.draw_meta(arguments.plot, result)
        else:
            plots.draw_ccdf(arguments.plot, result, limit_of(result, thresholds_db))
        written(arguments.plot)


def limit_of(result: Result, thresholds_db: np.ndarray) -> np.ndarray | None:
    """The law that a dense network of strongest cells, all active, tends to, where there is one."""
    regime = result.regime
    network = result.provenance["network"]
    if regime.name != "saturation" or network["association"] != "strongest" or network["activity"] != 1:
        return None
    return saturation.coverage(regime.rho, 10 ** (thresholds_db / 10))


def level_db(thresholds_db: np.ndarray, ccdf: np.ndarray, level: float) -> float:
    """The threshold that is exceeded with this probability, between two thresholds by a straight line; nan outside."""
    order = np.argsort(thresholds_db)
    x, y = thresholds_db[order], ccdf[order]
    if not y[-1] <= level <= y[0]:
        return float("nan")
    return float(np.interp(-level, -y, x))


def print_levels(result: Result) -> None:
    """From the histogram, whatever the thresholds; the conditional method has none."""
    if result.provenance["method"] == "conditional":
        return
    edges_db, above, _ = result.sinr_ccdf()
    laws = {
        f"{density:.4g} /km2": (edges_db, row) for density, row in zip(result.densities_per_km2, above, strict=True)
    }
    if (limit := limit_of(result, LIMIT_DB)) is not None:
        laws["limit"] = LIMIT_DB, limit
    rows = [(name, *(plain(level_db(*law, 1 - level)) for level in LEVELS)) for name, law in laws.items()]
    print_table("SINR in dB that a share of all users is below", ("", *(f"{level:.0%}" for level in LEVELS)), rows)


def print_meta(result: Result) -> None:
    """The share of geometries whose coverage is above some reliabilities."""
    bins = result.histogram.shape[-1]
    count = result.histogram.sum(axis=-1)
    columns = shown_columns(result.thresholds_db)
    rows = []
    for row, density in enumerate(result.densities_per_km2):
        for column in columns:
            above = result.histogram[row, column, ::-1].cumsum()[::-1] / count[row, column]
            shares = [f"{above[round(reliability * bins)]:.4f}" for reliability in RELIABILITIES]
            rows.append((f"{density:.4g} /km2, {result.thresholds_db[column]:g} dB", *shares))
    heads = ("", *(f"above {reliability:.0%}" for reliability in RELIABILITIES))
    print_table("Share of geometries in which the coverage of a user is", heads, rows)
    print_text(f"Reliabilities are rounded to 1/{bins}, the width of a bin.")
