"""Every exact law against simulation: value, estimate, standard error, and how many of them apart, z.

Asymptotes and approximations have no z: they are shown apart, each with the tolerance it is held to.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import groupby
from math import inf, isfinite
from pathlib import Path

from tokenweave_models.common.console import print_table, print_text, progress
from tokenweave_models.common.errors import UserError
from tokenweave_models.common.output import check_output
from tokenweave_models.densification.runner import options
from tokenweave_models.densification.runner.checks import Check, Sampling
from tokenweave_models.densification.runner.laws import LAWS
from tokenweave_models.densification.runner.reporting import escaped, with_error, write_report

MOST_Z = 4.0
LEAST = 10_000  # realisations


class Failed(UserError):
    """An exact law and its simulation disagree."""


def run(arguments: argparse.Namespace) -> None:
    check_output(arguments.json)
    laws = {name: law for name, law in LAWS.items() if arguments.only is None or arguments.only in name}
    if not laws:
        raise UserError(f"--only must be a word of one of: {'; '.join(LAWS)}; got {arguments.only!r}")
    sampling = Sampling(arguments.n, arguments.seed, options.device_of(arguments.device))
    if arguments.n < LEAST:
        raise UserError(f"--n must be at least {LEAST}, or z would not mean what it says; got {arguments.n}")
    checks: list[Check] = []
    with options.refused_in_words(), progress() as bar:
        task = bar.add_task("laws", total=len(laws))
        for name, law in laws.items():
            bar.update(task, description=name)
            checks += [check.within(name) for check in law(sampling)]
            bar.advance(task)
    exact = [check for check in checks if check.tolerance is None]
    limits = [check for check in checks if check.tolerance is not None]
    print_table(
        f"Exact laws, {arguments.n} realisations each, seed {arguments.seed}, {sampling.device}",
        ("law", "exact", "estimate", "z"),
        by_law(exact, lambda check: (f"{check.value:.6g}", with_error(check.estimate, check.error), f"{check.z:+.2f}")),
    )
    if limits:
        print_table(
            "Asymptotes and approximations: the relative distance they are held to, give or take 3 standard errors",
            ("law", "value", "estimate", "distance", "held to"),
            by_law(
                limits,
                lambda check: (
                    f"{check.value:.6g}",
                    with_error(check.estimate, check.error),
                    f"{check.distance:.2%}",
                    f"{check.tolerance:.2%}",
                ),
            ),
        )
    write_checks(arguments.json, arguments, checks)
    report(exact, limits)


def by_law(checks: list[Check], cells: Callable[[Check], tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows, those of a law below its name."""
    rows: list[tuple[str, ...]] = []
    for name, group in groupby(checks, key=lambda check: check.law):
        found = [(escaped(f"  {check.name}"), *cells(check)) for check in group]
        rows += [(escaped(name), *[""] * (len(found[0]) - 1)), *found]
    return rows


def report(exact: list[Check], limits: list[Check]) -> None:
    """Says how it went. Raises Failed if a law does not hold."""
    apart = [check for check in exact if not abs(check.z) < MOST_Z]
    outside = [check for check in limits if not check.is_within_tolerance]
    scores = [abs(check.z) for check in exact if isfinite(check.z)]
    if exact:
        held, far_out = len(exact) - len(apart), sum(score > 2 for score in scores)
        print_text(
            f"{held} of {len(exact)} exact values are within {MOST_Z:g} standard errors; the largest |z| is "
            f"{max(scores, default=inf):.2f}, {far_out} are above 2. Rows share realisations: they are not independent."
        )
    if limits:
        held = len(limits) - len(outside)
        print_text(f"{held} of {len(limits)} asymptotes and approximations are within their tolerance.")
    if apart or outside:
        names = "; ".join(f"{check.law}: {check.name}" for check in [*apart, *outside])
        raise Failed(f"verify: these do not hold: {names}")


def write_checks(path: Path | None, arguments: argparse.Namespace, checks: list[Check]) -> None:
    rows = [vars(check) | {"z": check.z if check.tolerance is None else None} for check in checks]
    write_report(path, {"checks": rows, "provenance": options.provenance_of(arguments) | {"seed": arguments.seed}})
