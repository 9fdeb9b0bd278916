"""The terminal: with rich where it is installed, in plain lines where not. A GPU server may have torch and no more."""

from __future__ import annotations

import contextlib
import sys
import textwrap
from collections.abc import Iterator

try:
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError:
    Console = None

LEFT_ALIGNED = ("case", "dtype", "cache")


class Terminal:
    def __init__(self):
        self.is_live = Console is not None and sys.stdout.isatty()
        self._console = Console and Console(width=None if sys.stdout.isatty() else 120)

    def print(self, text: str) -> None:
        if self._console:
            self._console.print(text, style="dim", highlight=False, markup=False)
        else:
            print(textwrap.fill(text, 120), flush=True)

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator:
        """Yields advance(what comes next); draws a bar on a live terminal and nothing elsewhere."""
        if not self.is_live:
            yield lambda description: None
            return
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task("limits of this machine", total=total)

            def advance(description: str) -> None:
                bar.update(task, advance=1, description=description)

            yield advance

    def table(self, title: str, headings: list[str], rows: list[list[str]], bad: list[bool]) -> None:
        if self._console is None:
            above = ["vs" if heading.startswith("vs ") else "" for heading in headings]
            below = [heading.removeprefix("vs ") for heading in headings]
            widths = [max(len(line[i]) for line in [below, *rows]) for i in range(len(headings))]
            print(f"\n{title}")
            for line in [above, below, *rows]:
                cells = [
                    cell.ljust(width) if heading in LEFT_ALIGNED else cell.rjust(width)
                    for cell, width, heading in zip(line, widths, headings, strict=True)
                ]
                print("  " + "  ".join(cells).rstrip())
            return
        style = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD}
        drawn = Table(title=f"\n{title}", **style, collapse_padding=True, pad_edge=False)
        for heading in headings:
            justify = "left" if heading in LEFT_ALIGNED else "right"
            drawn.add_column(heading.replace("vs ", "vs\n"), justify=justify, no_wrap=heading in ("us", "p20 - p80"))
        for row, is_bad in zip(rows, bad, strict=True):
            drawn.add_row(*row, style="bold red" if is_bad else None)
        self._console.print(drawn)
