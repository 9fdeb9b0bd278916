"""Passes of the model over a batch of sequences in different blocks: what is computed, what is read from the cache.

A step computes the logits of the rows that it can commit; of whole blocks where the step before is compared with, and
in a graph. What the model itself has to compute:

cache     a sequence that begins a block      the steps after it in that block
none      all of its positions                all of its positions
prefix    all of its positions                from the block's first position to the end
dual      all of its positions                the block

Prefix and dual are those of Fast-dLLM (arXiv 2505.22618). For a shifted model the window begins one row earlier, at the
row that predicts the block's first token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenweave_models.localleap.block_graph import BlockGraph
from tokenweave_models.localleap.cache import KVCache
from tokenweave_models.localleap.model import DiffusionModel

CACHES = ("none", "prefix", "dual")


class Passes:
    """Computes logits for the masked positions of each sequence's block.

    Args:
        tokens: [batch, length] int64 on the model's device, padded on the left.
        paddings: [batch] int64 on the CPU, how many positions of each sequence are padding.
        block_start: [batch] int64 on the model's device, read by graphs only, which follow what is written there.
        cache: one of CACHES.
        whole_blocks: compute the logits of all positions of a block, in their order.
        use_graph: of a GPU and the dual cache: replay steps in which no sequence begins a block as a CUDA graph.
    """

    def __init__(
        self,
        model: DiffusionModel,
        tokens: Tensor,
        paddings: Tensor,
        block_start: Tensor,
        block_length: int,
        *,
        cache: str,
        whole_blocks: bool = False,
        use_graph: bool = False,
    ):
        self.model, self.tokens = model, tokens
        self.device, self.length = tokens.device, tokens.shape[1]
        self._shift = int(model.config.shifted)
        self._kind, self._whole_blocks, self._use_graph = cache, whole_blocks, use_graph
        self._block_length = block_length
        self._cache = None if cache == "none" else self._new_cache(tokens.shape[0])
        self._set_batch(paddings, block_start)

    def keep(self, index: Tensor, block_start: Tensor) -> None:
        """Goes on with the sequences of index [n], int64 on the CPU, only; block_start is theirs, as before."""
        on_device = index.to(self.device)
        self.tokens = self.tokens[on_device]
        if self._cache is not None:
            kept = self._new_cache(len(index))
            torch.index_select(self._cache.keys, 1, on_device, out=kept.keys)
            torch.index_select(self._cache.values, 1, on_device, out=kept.values)
            self._cache = kept
        self._set_batch(self._paddings[index], block_start)

    def logits(self, block: Tensor, is_masked: Tensor, begins: Tensor) -> tuple[Tensor, Tensor | None]:
        """(logits, rows) as decode_step_ takes them; those of a float64 model are rounded to fp32.

        Args:
            block: [batch, block_length] int64, positions of each sequence's block.
            is_masked: bool of the same shape. A sequence without masks takes no part.
            begins: [batch] bool: the sequence begins this block. All three on the CPU.
        """
        windowed, full = self._parts(is_masked, begins)
        if self._replays(full):
            self.prepare(is_masked, begins)
            return self._graph.replay(), None

        # All that the device has to be told is found first and sent at once, before anything is launched: a copy behind
        # a pass would wait for it.
        wanted = torch.ones_like(is_masked) if self._whole_blocks else is_masked
        predicting = self._predicting(block, self._paddings)
        rows = torch.full_like(block, -1)
        sent = [rows]
        # The window pass takes all sequences, since their cache is one tensor; what it writes for those that begin a
        # block is then overwritten by the full pass.
        if windowed.any():
            window = self._window(block, windowed)
            sent += [window, self._take(rows, wanted & windowed[:, None], predicting - window[:, :1], window.shape[1])]
        if full.any():
            places = (full.cumsum(0) - 1)[:, None]
            taken = self._take(rows, wanted & full[:, None], predicting, self.length, places)
            sent += [full.nonzero().flatten(), taken]
        rows, *sent = self._send(sent)

        pieces = []
        if windowed.any():
            window, taken, *sent = sent
            pieces.append(self._window_states(window).flatten(0, 1)[taken])
        if full.any():
            index, taken = sent
            pieces.append(self._full_states(None if full.all() else index).flatten(0, 1)[taken])
        hidden = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if self._whole_blocks:
            return self._head(hidden[rows.flatten()]).unflatten(0, block.shape), None
        return self._head(hidden), rows

    def prepare(self, is_masked: Tensor, begins: Tensor) -> None:
        """Captures the graph that the step of these arguments replays, if there is none yet: not a part of its time."""
        _, full = self._parts(is_masked, begins)
        if self._replays(full) and self._graph is None:
            self._graph = BlockGraph(self._block_logits, self.device)

    def _parts(self, is_masked: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        """Which sequences a window is enough for, and which need a full pass."""
        takes_part = is_masked.any(dim=1)
        full = takes_part if self._cache is None else takes_part & begins
        return takes_part & ~full, full

    def _replays(self, full: Tensor) -> bool:
        return self._use_graph and not full.any()

    def _take(self, rows: Tensor, taken: Tensor, offsets: Tensor, width: int, places: Tensor | None = None) -> Tensor:
        """Which rows of a pass of `width` positions predict the taken positions; numbers them on in `rows`."""
        if places is None:
            places = torch.arange(len(offsets))[:, None]
        index = (places * width + offsets)[taken]
        begin = int(rows.max()) + 1
        rows[taken] = torch.arange(begin, begin + len(index))
        return index

    def _send(self, tensors: list[Tensor]) -> list[Tensor]:
        """int64 tensors of the CPU on the device, in one copy that the host does not wait for."""
        if self.device.type == "cpu":
            return tensors
        return unpacked(packed(tensors).pin_memory().to(self.device, non_blocking=True), tensors)

    # ----------------------------------------------------------------------------------------------------------- passes

    def _full_states(self, index: Tensor | None) -> Tensor:
        """Hidden states of all positions of the sequences of `index`, on the device, or of all of them."""
        if index is None:
            return self.model.hidden_states(self.tokens, valid=self._valid, cache=self._cache)
        valid = None if self._valid is None else self._valid[index]
        cache = None if self._cache is None else self._new_cache(len(index))
        hidden = self.model.hidden_states(self.tokens[index], valid=valid, cache=cache)
        if cache is not None:
            self._cache.keys.index_copy_(1, index, cache.keys)
            self._cache.values.index_copy_(1, index, cache.values)
        return hidden

    def _window(self, block: Tensor, part: Tensor) -> Tensor:
        """[batch, width], the positions to compute. A window that is shorter than others repeats its last position: the
        same token, key and value."""
        first = block[:, 0] - self._shift
        width = self._block_length + self._shift if self._kind == "dual" else self.length - int(first[part].min())
        return (first[:, None] + torch.arange(width)).clamp(max=self.length - 1)

    def _window_states(self, window: Tensor) -> Tensor:
        tokens = self.tokens.gather(1, window)
        return self.model.hidden_states(tokens, valid=self._valid, cache=self._cache, positions=window)

    def _block_logits(self) -> Tensor:
        """[batch, block_length, vocab_size] by a pass over the blocks; all on the device, for a graph."""
        first = (self._block_start - self._shift)[:, None]
        steps = torch.arange(self._block_length + self._shift, device=self.device)
        hidden = self._window_states(first + steps)
        block = self._block_start[:, None] + steps[: self._block_length]
        rows = self._predicting(block, self._paddings_on_device) - first
        return self._head(hidden.gather(1, rows[:, :, None].expand(-1, -1, hidden.shape[2])))

    def _predicting(self, positions: Tensor, paddings: Tensor) -> Tensor:
        """The positions of the rows that predict the tokens at these ones."""
        return torch.maximum(positions - self._shift, paddings[:, None]) if self._shift else positions

    def _head(self, hidden: Tensor) -> Tensor:
        logits = self.model.logits(hidden)
        return logits.float() if logits.dtype == torch.float64 else logits

    # ------------------------------------------------------------------------------------------------------------ state

    def _new_cache(self, batch: int) -> KVCache:
        return KVCache(self.model.config, batch, self.length, self.model.embed_tokens.weight.dtype, self.device)

    def _set_batch(self, paddings: Tensor, block_start: Tensor) -> None:
        self._paddings, self._paddings_on_device, self._block_start = paddings, paddings.to(self.device), block_start
        self._valid: Tensor | None = None
        if paddings.any():
            self._valid = torch.arange(self.length, device=self.device) >= self._paddings_on_device[:, None]
        self._graph: BlockGraph | None = None


def packed(tensors: list[Tensor]) -> Tensor:
    """All elements in one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def unpacked(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of the vector that have the shapes of the tensors it was packed from."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
