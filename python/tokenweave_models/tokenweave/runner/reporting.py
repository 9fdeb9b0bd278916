"""What a run tells: rank 0 prints and writes files, the others are silent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenweave_models.common.console import print_table, print_text, progress
from tokenweave_models.common.errors import UserError


class _NoProgress:
    def __enter__(self) -> _NoProgress:
        return self

    def __exit__(self, *_exception) -> None:
        pass

    def add_task(self, description: str, total: float | None = None) -> int:
        return 0

    def advance(self, task: int, advance: float = 1) -> None:
        pass

    def update(self, task: int, **_fields) -> None:
        pass


class Reporter:
    def __init__(self, is_first: bool):
        self.is_first = is_first

    def print(self, text: str = "") -> None:
        if self.is_first:
            print_text(text)

    def write(self, text: str) -> None:
        """A piece of a line, at once."""
        if self.is_first:
            print(text, end="", flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        if self.is_first:
            print_table(title, columns, rows)

    def progress(self):
        return progress() if self.is_first else _NoProgress()

    def write_json(self, path: Path | None, report: dict[str, Any]) -> None:
        if path is None or not self.is_first:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
        self.print(f"Written: {path}")
