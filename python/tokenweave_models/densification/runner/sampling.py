"""A sweep with a bar that shows how far it is, and the files it leaves."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import Any

from tokenweave_models.common.console import progress
from tokenweave_models.common.errors import UserError
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.result import Result
from tokenweave_models.densification.run import Progress
from tokenweave_models.densification.runner.options import refused_in_words
from tokenweave_models.densification.runner.reporting import written
from tokenweave_models.densification.sweep import sweep


def sweep_with_bar(words: str, network: Network, densities_per_km2, thresholds_db, **options: Any) -> Result:
    with refused_in_words(), progress() as bar:
        task = bar.add_task(words, total=None)

        def show(found: Progress) -> None:
            error = "" if isnan(found.largest_se) else f", largest error {found.largest_se:.2g}"
            bar.update(task, total=found.planned, completed=found.num_realisations, description=words + error)

        result = sweep(network, densities_per_km2, thresholds_db, progress=show, **options)
        done = result.provenance.get("num_realisations", 1)  # formulas show nothing, nor what was done
        bar.update(task, total=done, completed=done)
    return result


def save(result: Result, paths: list[Path]) -> None:
    for path in paths:
        try:
            result.save(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
        written(path)
