"""The density at which coverage, coverage per area or spectral efficiency per area is highest, with its interval."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import numpy as np

from tokenweave_models.common.console import print_table, print_text, progress
from tokenweave_models.common.errors import UserError
from tokenweave_models.common.output import check_output
from tokenweave_models.densification import units
from tokenweave_models.densification.optimum import Optimum, optimum
from tokenweave_models.densification.run import Progress
from tokenweave_models.densification.runner import options, plots
from tokenweave_models.densification.runner.reporting import (
    print_warnings,
    title_of,
    with_error,
    write_report,
    written,
)
from tokenweave_models.densification.runner.sampling import sweep_with_bar

CURVE_POINTS = 61  # of the plot


def run(arguments: argparse.Namespace) -> None:
    check_output(arguments.json)
    options.check_plot(arguments.plot)
    network = options.network_of(arguments)
    options.check_rate(network, arguments.quantity == "ase", "--quantity coverage can be asked for")
    provenance = options.provenance_of(arguments)
    method = options.method_of(network, "auto", rate=arguments.quantity == "ase")
    given = {
        "num_realisations": arguments.n,
        "settings": options.settings_of(arguments, method),
        "seed": arguments.seed,
        "device": options.device_of(arguments.device),
    } | provenance
    threshold_db = threshold_of(arguments)
    low, high = range_of(arguments.range)
    with options.refused_in_words(), progress() as bar:
        task = bar.add_task("sampling", total=None)

        def show(found: Progress) -> None:
            bar.update(task, total=found.planned, completed=found.num_realisations)

        found = optimum(
            network, arguments.quantity, threshold_db, range_per_km2=(low, high), progress=show, **given
        )  # fmt: skip
    if found.kind == "interior":
        print_table(
            f"{title_of(network)}, {arguments.n} realisations",
            ("quantity", "best density, /km2", "95 % interval", "value there"),
            [
                (
                    arguments.quantity.replace("_", " "),
                    f"{found.density_per_km2:.4g}",
                    f"{found.density_low:.4g} to {found.density_high:.4g}",
                    with_error(found.value, found.value_se),
                )
            ],
        )
    print_text(f"Verdict: {found.words}")
    print_warnings(found.result.warnings)
    write_report(arguments.json, report_of(found) | {"provenance": found.result.provenance | provenance})
    if arguments.plot is not None:
        thresholds_db = [] if threshold_db is None else [threshold_db]
        densities = np.geomspace(low, high, CURVE_POINTS)
        rate = arguments.quantity == "ase"
        curve = sweep_with_bar("drawing", network, densities, thresholds_db, rate=rate, **given)
        plots.draw_optimum(arguments.plot, found, curve)
        written(arguments.plot)


def range_of(text: str) -> tuple[float, float]:
    ends = units.parse_densities(text, field="--range")
    if len(ends) != 2:
        raise UserError(f"--range must be two densities, LOW,HIGH/km2, got {text!r}")
    return float(ends[0]), float(ends[1])


def threshold_of(arguments: argparse.Namespace) -> float | None:
    if arguments.quantity == "ase":
        options.refuse_unused(arguments, "with --quantity ase", "threshold")
        return None
    if arguments.threshold is None:
        raise UserError(f"--quantity {arguments.quantity} needs a --threshold, such as 0dB")
    thresholds_db = units.parse_thresholds(arguments.threshold, field="--threshold")
    if len(thresholds_db) != 1:
        raise UserError(f"--threshold must be one number with its unit, got {arguments.threshold!r}")
    return float(thresholds_db[0])


def report_of(found: Optimum) -> dict:
    plain = {name: value for name, value in vars(found).items() if name != "result"}
    return plain | {"regime": asdict(found.result.regime), "warnings": found.result.warnings}
