"""Text to tokens and back: the tokenizer of a model's folder, and one of bytes that needs no file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from tokenweave_models.common.checkpoint import model_folder, read_json
from tokenweave_models.common.errors import UserError

CUT_CHARACTER = "\ufffd"


class Tokenizer(Protocol):
    vocab_size: int  # every token is smaller
    eos_tokens: frozenset[int]  # each of them ends a text

    def encode(self, text: str) -> torch.Tensor:
        """Tokens, int64, of shape [num_tokens], with the special ones that a text of this model begins with."""

    def decode(self, tokens: Sequence[int] | torch.Tensor) -> str:
        """The text, without special tokens. Bytes that are not UTF-8 (a cut character) become U+FFFD."""


class ByteTokenizer:
    """One token per byte of UTF-8."""

    vocab_size = 256
    eos_tokens: frozenset[int] = frozenset()

    def encode(self, text: str) -> torch.Tensor:
        return torch.tensor(list(text.encode("utf-8")), dtype=torch.int64)

    def decode(self, tokens: Sequence[int] | torch.Tensor) -> str:
        return bytes(_as_list(tokens)).decode("utf-8", errors="replace")


class FolderTokenizer:
    """The tokenizer.json of a model's folder, through the `tokenizers` package.

    Raises:
        UserError: the package or the file is missing, or the file is broken.
    """

    def __init__(self, folder: str | Path):
        try:
            import tokenizers
        except ImportError as error:
            raise UserError("tokenizers is not installed; run: pip install 'tokenweave-ops[models]'") from error
        path = model_folder(folder) / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{folder}: has no tokenizer.json; no other format of tokenizers is read")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package has no class for its errors
            raise UserError(f"{path}: is not a tokenizer: {error}") from error
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.eos_tokens = eos_tokens(folder)

    def encode(self, text: str) -> torch.Tensor:
        return torch.tensor(self._tokenizer.encode(text).ids, dtype=torch.int64)

    def decode(self, tokens: Sequence[int] | torch.Tensor) -> str:
        """Tokens that the tokenizer does not have (a model's vocabulary is often padded) are left out."""
        return self._tokenizer.decode(_as_list(tokens), skip_special_tokens=True)


def eos_tokens(folder: str | Path) -> frozenset[int]:
    """What ends a text, by generation_config.json, which chat models use to add to what config.json says; if it says
    nothing, by config.json."""
    path = model_folder(folder)
    for name in ("generation_config.json", "config.json"):
        found = read_json(path / name).get("eos_token_id") if (path / name).is_file() else None
        if found is None:
            continue
        tokens = found if isinstance(found, list) else [found]
        if not all(type(token) is int and token >= 0 for token in tokens):
            raise UserError(f"{path / name}: eos_token_id must be a token or a list of tokens, got {found!r}")
        return frozenset(tokens)
    return frozenset()


class TextStream:
    """The text of tokens that come one by one, in pieces that can be printed at once.

    A character may be cut between tokens, so a piece that would end within one is held back. What a token's text is may
    depend on the one before it (a leading space), so each piece is what a token adds to the text of a few before it.
    The pieces together are the text of all tokens. (Not so for bytes that were never UTF-8, if the tokenizer judges a
    whole run of bytes at once, as Llama 2's and Mixtral's do: what was printed before the first odd one stays.)
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._tokens: list[int] = []  # the last that were printed, and those held back
        self._num_printed = 0

    def add(self, token: int) -> str:
        """What can be printed now, often one word, or "" if nothing yet."""
        self._tokens.append(token)
        piece = self._new_text()
        if not piece or piece.endswith(CUT_CHARACTER):
            return ""
        self._tokens = self._tokens[self._num_printed :]
        self._num_printed = len(self._tokens)
        return piece

    def end(self) -> str:
        """What was held back. A character that stays cut becomes U+FFFD."""
        piece = self._new_text()
        self._tokens, self._num_printed = [], 0
        return piece

    def _new_text(self) -> str:
        printed = self._decode(self._tokens[: self._num_printed])
        return self._decode(self._tokens)[len(printed) :]


def _as_list(tokens: Sequence[int] | torch.Tensor) -> list[int]:
    return tokens.tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
