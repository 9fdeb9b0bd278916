"""The loop that decodes sequences side by side: passes of the model, one decode_step_, and who goes on to which block.

Each sequence works on its own current block and moves on when that block has no masks left; who is done leaves the
batch. What a sequence decodes to depends on neither its neighbours nor their blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tokenweave_models.common.stopwatch import Stopwatch
from tokenweave_models.localleap.model import DiffusionModel
from tokenweave_models.localleap.passes import Passes
from tokenweave_ops import DecodeRequests, DecodeStep, decode_step_

Selector = Callable[..., DecodeStep]


class Commit(NamedTuple):
    """A token that was decided for good.

    Attributes:
        sequence: its number, from 0, in the order of the call.
        position: its place in that sequence, prompt included and padding not, from 0.
        token: its id.
    """

    sequence: int
    position: int
    token: int


@dataclass(frozen=True)
class Statistics:
    """What one sequence took.

    Attributes:
        forward_passes: of the model, over all of it or over a window.
        committed: tokens that these decided. An early stop fills up without deciding.
        bad_rows: rows of logits without a finite maximum: the model produced NaN or inf.
        model_s, selector_s: time of the passes and of the decode_step_ calls it took part in, without what capturing a
            graph takes. It shared them with the batch, so that those of several sequences do not add up.
    """

    forward_passes: int
    committed: int
    bad_rows: int
    model_s: float
    selector_s: float

    @property
    def tokens_per_forward(self) -> float:
        return self.committed / self.forward_passes if self.forward_passes else 0.0


@dataclass(frozen=True)
class Rules:
    """What holds for all sequences alike; ``generate`` says what each means."""

    cache: str = "none"
    steps: int = 1
    forbidden: Tensor | None = None
    deferred: Tensor | None = None
    vocab_limit: int | None = None
    stop_id: int | None = None
    exact: bool = False
    cuda_graph: bool = False


@dataclass
class _Slot:
    """A sequence under way. Positions are those of the padded batch."""

    number: int
    padding: int
    starts: list[int]  # of its blocks
    block: int = 0  # which of them is the current one
    begins: bool = True  # it has had no pass yet
    is_done: bool = False
    steps: list[int] = field(default_factory=list)  # those that it took part in
    committed: int = 0
    bad_rows: int = 0

    @property
    def start(self) -> int:
        return self.starts[self.block]


class BlockDecoder:
    """Decodes the masks within blocks. Iterate over it, once: each item is the commits of a step.

    Afterwards ``results`` is complete. On a GPU the host waits for each step's report, one small copy: to launch the
    next pass on a guess would waste a pass of the model whenever a block ends.

    Args:
        texts: of each sequence its tokens, int64 on the CPU, of any length.
        blocks: of each sequence the first positions of the blocks that it decodes, in its own text, in order. One may
            be negative, where the text is shorter than a block. No blocks: the text stays as it is.
        requests: one per text, on the model's device; copied.

    Attributes:
        results: of each sequence its tokens, int64 on the CPU; those of a sequence under way are as given.
        num_steps: decode_step_ calls so far.
        length: of the padded sequences.
    """

    def __init__(
        self,
        model: DiffusionModel,
        texts: Sequence[Tensor],
        blocks: Sequence[Sequence[int]],
        requests: DecodeRequests,
        rules: Rules,
        selector: Selector = decode_step_,
    ):
        self.results, self.num_steps = list(texts), 0
        self._rules, self._selector, self._mask_id = rules, selector, model.config.mask_id
        self.length = padded_length(texts, blocks, model.config.shifted)
        paddings = [self.length - len(text) for text in texts]
        self._all = [
            _Slot(number, padding, [padding + start for start in starts])
            for number, (padding, starts) in enumerate(zip(paddings, blocks, strict=True))
        ]
        self._slots = [slot for slot in self._all if slot.starts]
        self._device = model.embed_tokens.weight.device
        self._model_watch, self._selector_watch = Stopwatch(self._device), Stopwatch(self._device)
        if not self._slots:
            return
        # The host keeps a copy of the tokens, since where masks are left decides what the next pass computes.
        self._host_tokens = torch.full((len(self._slots), self.length), model.config.eos_id, dtype=torch.int64)
        for row, slot in enumerate(self._slots):
            self._host_tokens[row, slot.padding :] = texts[slot.number]
        self._requests = requests.select(torch.tensor([slot.number for slot in self._slots], device=self._device))
        self._block_offsets = torch.arange(requests.block_length)
        # klass compares with the logits of the step before, of whole blocks, since who is masked changes.
        compares = "divergence" in requests.features
        self._passes = Passes(
            model, self._host_tokens.to(self._device), torch.tensor([slot.padding for slot in self._slots]),
            self._requests.block_start, requests.block_length,
            cache=rules.cache, whole_blocks=compares, use_graph=rules.cuda_graph,
        )  # fmt: skip
        self._compares, self._previous_logits = compares, None
        self._begin_blocks()

    def __iter__(self) -> Iterator[list[Commit]]:
        while self._slots:
            yield self._step()

    def statistics(self) -> list[Statistics]:
        """Of each sequence. Waits for the device."""
        model_ms, selector_ms = self._model_watch.each_ms(), self._selector_watch.each_ms()
        return [
            Statistics(
                forward_passes=len(slot.steps),
                committed=slot.committed,
                bad_rows=slot.bad_rows,
                model_s=sum(model_ms[step] for step in slot.steps) * 1e-3,
                selector_s=sum(selector_ms[step] for step in slot.steps) * 1e-3,
            )
            for slot in self._all
        ]

    def total_seconds(self) -> tuple[float, float]:
        """Of all passes of the model, and of all decode_step_ calls. Waits for the device."""
        return self._model_watch.total_ms() * 1e-3, self._selector_watch.total_ms() * 1e-3

    # ----------------------------------------------------------------------------------------------------------- a step

    @torch.inference_mode()
    def _step(self) -> list[Commit]:
        block = torch.tensor([slot.start for slot in self._slots])[:, None] + self._block_offsets
        is_masked = self._host_tokens.gather(1, block) == self._mask_id
        counts, tokens = self._decode(block, is_masked)
        self._host_tokens.scatter_(1, block, tokens.where(tokens >= 0, self._host_tokens.gather(1, block)))
        commits = []
        for row, column in (tokens >= 0).nonzero().tolist():
            slot = self._slots[row]
            place = int(block[row, column]) - slot.padding
            commits.append(Commit(slot.number, place, int(tokens[row, column])))
        self._move_on(counts, is_masked.any(dim=1).tolist())
        return commits

    def _decode(self, block: Tensor, is_masked: Tensor) -> tuple[list[list[int]], Tensor]:
        """(counts of decode_step_, the tokens it committed or -1 [batch, block_length]), on the CPU.

        Here the host waits for the device."""
        rules = self._rules
        begins = torch.tensor([slot.begins for slot in self._slots])
        self._passes.prepare(is_masked, begins)
        with self._model_watch.measure():
            logits, rows = self._passes.logits(block, is_masked, begins)
        if self._compares and self._previous_logits is None:
            self._previous_logits = torch.zeros_like(logits)
        with self._selector_watch.measure():
            done = self._selector(
                logits, self._passes.tokens, self._requests,
                mask_id=self._mask_id, rows=rows, forbidden=rules.forbidden, deferred=rules.deferred,
                previous_logits=self._previous_logits, vocab_limit=rules.vocab_limit, exact=rules.exact,
            )  # fmt: skip
        if self._compares:
            self._previous_logits.copy_(logits)  # not kept: a graph's next replay overwrites them
        report = torch.cat((done.counts, done.candidates.masked_fill(~done.committed, -1)), dim=1).cpu()
        num_counts = done.counts.shape[1]
        counts = report[:, :num_counts].tolist()
        if any(problems for *_, problems in counts):
            done.raise_problems()
        return counts, report[:, num_counts:]

    def _move_on(self, counts: list[list[int]], took_part: list[bool]) -> None:
        for row, (slot, active) in enumerate(zip(self._slots, took_part, strict=True)):
            if active:
                committed, remaining, bad_rows, _ = counts[row]
                if committed == 0:  # and so it would go on for ever
                    raise RuntimeError(
                        f"generate: sequence {slot.number}: a step committed none of {remaining} masks; "
                        "forbidden_ids and vocab_limit must leave a token to choose"
                    )
                slot.steps.append(self.num_steps)
                slot.committed += committed
                slot.bad_rows += bad_rows
                slot.begins = False
                if remaining == 0:
                    self._end_block(row, slot)
        self.num_steps += 1
        self._drop_done()
        if any(slot.begins for slot in self._slots):
            self._begin_blocks()

    def _end_block(self, row: int, slot: _Slot) -> None:
        end, stop_id = slot.start + len(self._block_offsets), self._rules.stop_id
        if stop_id is not None and (self._host_tokens[row, slot.start : end] == stop_id).any():
            self._host_tokens[row, end:] = stop_id
            slot.is_done = True
        elif slot.block + 1 == len(slot.starts):
            slot.is_done = True
        else:
            slot.block += 1
            slot.begins = True
        if slot.is_done:
            self.results[slot.number] = self._host_tokens[row, slot.padding :].clone()

    def _begin_blocks(self) -> None:
        starts = torch.tensor([slot.start for slot in self._slots])
        begins = torch.tensor([slot.begins for slot in self._slots])
        self._requests.begin_block_(starts.to(self._device), self._rules.steps, begins.to(self._device))

    def _drop_done(self) -> None:
        """Takes who is done out of the batch. With graphs, of which each is for one size of batch, not one by one."""
        live = [row for row, slot in enumerate(self._slots) if not slot.is_done]
        if len(live) == len(self._slots) or (self._rules.cuda_graph and 2 * len(live) > len(self._slots)):
            return
        self._slots = [self._slots[row] for row in live]
        if not live:
            return
        index = torch.tensor(live)
        on_device = index.to(self._device)
        self._requests = self._requests.select(on_device)
        self._passes.keep(index, self._requests.block_start)
        self._host_tokens = self._host_tokens[index]
        if self._previous_logits is not None:
            self._previous_logits = self._previous_logits[on_device]


def padded_length(texts: Sequence[Tensor], blocks: Sequence[Sequence[int]], is_shifted: bool) -> int:
    """Of sequences padded on the left, so that all blocks are within, and, for a shifted model, the row before them."""
    lengths = [
        len(text) + max(0, is_shifted - min(starts)) for text, starts in zip(texts, blocks, strict=True) if len(starts)
    ]
    return max(lengths, default=0)
