"""Which of two networks, each in a JSON file, is better: realisation by realisation, and on average."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from tokenweave_models.common.console import print_table, print_text, progress
from tokenweave_models.common.errors import UserError
from tokenweave_models.common.output import check_output
from tokenweave_models.densification import units
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.ordering import Comparison, compare
from tokenweave_models.densification.runner import options, plots
from tokenweave_models.densification.runner.reporting import shown_columns, with_error, write_report, written

KEYS = ("path_loss", "fading", "association", "noise", "transmit_power", "activity")


def run(arguments: argparse.Namespace) -> None:
    check_output(arguments.json)
    options.check_plot(arguments.plot)
    networks = [read_network(path) for path in (arguments.a, arguments.b)]
    densities = units.parse_densities(arguments.densities)
    thresholds_db = units.parse_thresholds(arguments.thresholds)
    rate = not arguments.no_rate
    for network in networks:
        options.check_rate(network, rate)
    method = options.method_of(networks[0], arguments.method, rate)
    settings = options.settings_of(arguments, method, residual="mean")
    device = options.device_of(arguments.device)
    with options.refused_in_words(), progress() as bar:
        task = bar.add_task("sampling", total=arguments.n)
        found = compare(
            *networks,
            densities,
            thresholds_db,
            num_realisations=arguments.n,
            rate=rate,
            method=arguments.method,
            settings=settings,
            seed=arguments.seed,
            device=device,
            progress=lambda done: bar.update(task, completed=done),
        )
    print_comparison([str(arguments.a), str(arguments.b)], networks, densities, thresholds_db, found)
    write_report(arguments.json, report_of(arguments, networks, densities, thresholds_db, found))
    if arguments.plot is not None:
        plots.draw_order(arguments.plot, densities, thresholds_db, found)
        written(arguments.plot)


def read_network(path: Path) -> Network:
    """Of a JSON object with :data:`KEYS`, or of what a sweep wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON: {error}") from error
    if isinstance(found, dict) and isinstance(found.get("provenance"), dict):
        found = found["provenance"].get("network")
    if not isinstance(found, dict) or "path_loss" not in found:
        raise UserError(f"{path}: must be an object with path_loss and, where wanted, {', '.join(KEYS[1:])}")
    if unknown := [name for name in found if name not in KEYS]:
        raise UserError(f"{path}: must have {', '.join(KEYS)} only, got {', '.join(unknown)}")
    words = dict(found)
    if isinstance(words.get("noise"), (int, float)):  # as a sweep wrote it: linear, relative to the transmit power
        words["noise"] = f"{words['noise']!r}x"
    is_number = {name: name == "activity" for name in words}
    for name, value in words.items():
        if not isinstance(value, (int, float) if is_number[name] else str) or isinstance(value, bool):
            raise UserError(f"{path}: {name} must be {'a number' if is_number[name] else 'a text'}, got {value!r}")
    try:
        return options.make_network(**words)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def print_comparison(
    names: list[str], networks: list[Network], densities: np.ndarray, thresholds_db: np.ndarray, found: Comparison
) -> None:
    for letter, name, network in zip("ab", names, networks, strict=True):
        print_text(f"{letter}: {name}: {network.path_loss.describe()}, {network.fading.describe()}")
    columns = shown_columns(thresholds_db)
    has_rate = not np.isnan(found.rate_nats.value).all()
    print_table(
        f"a less b, {found.num_realisations} realisations, {found.tolerance_db:.2g} dB are let pass as rounding",
        (
            "density, /km2",
            *(f"P > {thresholds_db[column]:g} dB" for column in columns),
            *(["rate"] if has_rate else []),
            "other way round",
            "star order",
        ),
        [
            (
                f"{density:.4g}",
                *(with_error(found.coverage.value[row, c], found.coverage.standard_error[row, c]) for c in columns),
                *([with_error(found.rate_nats.value[row], found.rate_nats.standard_error[row])] if has_rate else []),
                str(found.violations[row]) + (f", by {found.worst_db[row]:.3g} dB" if found.worst_db[row] else ""),
                "yes" if found.star_ordered[row] else "no",
            )
            for row, density in enumerate(densities)
        ],
    )
    print_text(f"Verdict: {found.words}.")


def report_of(arguments, networks, densities, thresholds_db, found: Comparison) -> dict:
    return {
        "a": networks[0].describe(),
        "b": networks[1].describe(),
        "densities_per_km2": densities.tolist(),
        "thresholds_db": thresholds_db.tolist(),
        "coverage": {name: values.tolist() for name, values in found.coverage._asdict().items()},
        "rate_nats": {name: values.tolist() for name, values in found.rate_nats._asdict().items()},
        "violations": found.violations.tolist(),
        "worst_db": found.worst_db.tolist(),
        "star_ordered": found.star_ordered.tolist(),
        "theorem": found.theorem,
        "tolerance_db": found.tolerance_db,
        "verdict": found.words,
        "provenance": options.provenance_of(arguments)
        | {"num_realisations": found.num_realisations, "seed": arguments.seed},
    }
