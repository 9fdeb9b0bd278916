"""A tokenizer without a vocabulary file: one token per byte of UTF-8."""

import torch


class ByteTokenizer:
    vocab_size = 256

    def encode(self, text: str) -> torch.Tensor:
        """Token ids, int64, of shape [number of UTF-8 bytes]."""
        return torch.tensor(list(text.encode("utf-8")), dtype=torch.int64)

    def decode(self, tokens: torch.Tensor) -> str:
        """The text again. Bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return bytes(tokens.tolist()).decode("utf-8", errors="replace")
