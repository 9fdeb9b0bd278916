"""Files that a program writes at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenweave_models.common.console import print_text
from tokenweave_models.common.errors import UserError


def check_output(path: Path | None) -> None:
    """Whether a file can be written there is asked before a long run, not after it."""
    if path is None:
        return
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    if is_new:
        path.unlink()


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """And says so."""
    if path is None:
        return
    try:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    print_text(f"Written: {path}")
