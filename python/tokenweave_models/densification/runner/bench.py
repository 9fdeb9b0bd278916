"""Time until P(SIR > threshold) is known to a standard error: simulation in a window, and the power domain."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from tokenweave_models.common.console import print_text, progress
from tokenweave_models.common.errors import UserError
from tokenweave_models.common.output import check_output
from tokenweave_models.densification import units
from tokenweave_models.densification.benchmark import Row, print_rows, time_to_equal_error
from tokenweave_models.densification.exact import saturation
from tokenweave_models.densification.runner import options, plots
from tokenweave_models.densification.runner.reporting import write_report, written

TARGETS = (1e-2, 3e-3, 1e-3)  # of the plot


def run(arguments: argparse.Namespace) -> None:
    check_output(arguments.json)
    options.check_plot(arguments.plot)
    if not 2 < arguments.exponent < 100:
        raise UserError(f"--exponent must be above 2 and below 100, got {arguments.exponent}")
    thresholds_db = units.parse_thresholds(arguments.threshold, field="--threshold")
    if len(thresholds_db) != 1:
        raise UserError(f"--threshold must be one number with its unit, got {arguments.threshold!r}")
    question = {
        "exponent": arguments.exponent,
        "threshold": float(10 ** (thresholds_db[0] / 10)),
        "stations": arguments.stations,
        "seed": arguments.seed,
        "device": options.device_of(arguments.device),
    }
    with options.refused_in_words():
        rows = time_to_equal_error(target=arguments.target_se, **question)
    print_rows(rows, float(saturation.coverage(2 / question["exponent"], question["threshold"])))
    print_text(
        "Bias is what no number of realisations removes: stations beyond the window, powers beyond the first ones."
    )
    report = {"rows": [vars(row) for row in rows], "threads": torch.get_num_threads()}
    if arguments.plot is not None:
        with options.refused_in_words():
            report["plot"] = error_against_time(TARGETS, **question)
        plots.draw_times(arguments.plot, {f"exponent {arguments.exponent:g}": report["plot"]})
        written(arguments.plot)
    write_report(arguments.json, report | {"provenance": options.provenance_of(arguments)})


def error_against_time(targets: Sequence[float], **question) -> dict[str, list[tuple[float, float, float]]]:
    """By method, for each target: (seconds, standard error, bias)."""
    runs: dict[str, list[tuple[float, float, float]]] = {}
    with progress() as bar:
        task = bar.add_task("measuring", total=len(targets))
        for target in targets:
            rows: list[Row] = time_to_equal_error(target=target, **question)
            for row in rows:
                runs.setdefault(row.method, []).append((row.wall_s, row.standard_error, row.bias))
            bar.advance(task)
    return runs
