"""Figures F1 to F8: every scaling law, drawn from runs that are kept and gone on from."""

from __future__ import annotations

import argparse

from tokenweave_models.common.console import print_text
from tokenweave_models.common.errors import UserError
from tokenweave_models.densification.runner import options
from tokenweave_models.densification.runner.figures import DRAWN, Study
from tokenweave_models.densification.runner.reporting import write_report, written

REALISATIONS = 2**20
QUICK_REALISATIONS = 2**14


def run(arguments: argparse.Namespace) -> None:
    count = QUICK_REALISATIONS if arguments.quick else REALISATIONS
    data = arguments.folder / "data"
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{data}: cannot be made: {error.strerror}") from error
    study = Study(data, count, arguments.seed, options.device_of(arguments.device), arguments.quick)
    provenance = options.provenance_of(arguments) | {"num_realisations": count, "seed": arguments.seed}
    for name in arguments.figures:
        title, draw = DRAWN[name]
        print_text(f"{name}: {title}")
        path = arguments.folder / f"{name}.png"
        with options.refused_in_words():
            found = draw(study, path)
        written(path)
        write_report(path.with_suffix(".json"), {"title": title, **found, "provenance": provenance})
