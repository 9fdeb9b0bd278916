"""Tables and progress on a terminal, through rich, which only these functions import."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from tokenweave_models.common.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


@cache
def console() -> Console:
    try:
        import rich.console
    except ImportError as error:
        raise UserError("rich is not installed; run: pip install 'tokenweave-ops[models]'") from error
    found = rich.console.Console(highlight=False)
    # Into a pipe rich would cut lines and tables at 80 columns.
    return found if found.is_terminal else rich.console.Console(highlight=False, soft_wrap=True, width=120)


def print_text(text: str = "") -> None:
    """Text as it is: rich would replace :smile: and tabs in what a model writes."""
    print(text, flush=True)


def progress() -> Progress:
    terminal = console()
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=terminal
    )


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The first column is text, all others are numbers."""
    terminal = console()
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    terminal.print(table)
