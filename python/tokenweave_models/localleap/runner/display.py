"""Text that is decided out of order, shown as it becomes known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from tokenweave_models.common.console import console
from tokenweave_models.common.tokenizer import TextStream
from tokenweave_models.localleap.decoding import Commit

MASK = "_"  # stands for a token that is not decided yet

Decode = Callable[[list[int]], str]


class Draft:
    """A text under way.

    Args:
        tokens: those that are known; None where one is not.
    """

    def __init__(self, tokens: Sequence[int | None], decode: Decode):
        self.tokens = list(tokens)
        self._decode = decode
        self._stream = TextStream(decode)
        self._num_printed = 0

    def prefix(self) -> str:
        """What can be printed since the last call: the text up to the first unknown token, in pieces."""
        pieces = []
        while self._num_printed < len(self.tokens) and (token := self.tokens[self._num_printed]) is not None:
            pieces.append(self._stream.add(token))
            self._num_printed += 1
        return "".join(pieces)

    def rest(self) -> str:
        """What prefix() held back, if all tokens are known."""
        return self.prefix() + self._stream.end()

    def picture(self) -> str:
        """All of it, a sign for each unknown token."""
        runs = groupby(self.tokens, key=lambda token: token is None)
        return "".join(MASK * len(list(run)) if unknown else self._decode(list(run)) for unknown, run in runs)


class Live:
    """On a terminal all drafts, redrawn at each step. In a pipe the only draft as far as it is readable from the left;
    of several nothing until the end."""

    def __init__(self, drafts: Sequence[Draft]):
        self._drafts = drafts
        self._live = None
        self.has_printed = not console().is_terminal and len(drafts) == 1

    def __enter__(self) -> Live:
        if console().is_terminal:
            import rich.live

            self._live = rich.live.Live(console=console(), auto_refresh=False, transient=True)
            self._live.__enter__()
        self.update([])
        return self

    def __exit__(self, *exception) -> None:
        if self._live is not None:
            self._live.__exit__(*exception)
        elif self.has_printed and exception[0] is None:
            print(self._drafts[0].rest(), flush=True)

    def update(self, commits: list[Commit]) -> None:
        for sequence, position, token in commits:
            self._drafts[sequence].tokens[position] = token
        if self._live is not None:
            import rich.text

            self._live.update(rich.text.Text("\n\n".join(draft.picture() for draft in self._drafts)), refresh=True)
        elif self.has_printed:
            print(self._drafts[0].prefix(), end="", flush=True)
