"""Runs a batch through a decoder: the order of sublayers and reductions, whole or in two halves.

    compute: | embed(s0) | embed(s1)   | attention(s0) | attention(s1) | mlp(s0)    | mlp(s1)    | attention(s0) ...
    reduce :             | (s0)        | (s1)          | (s0)          | (s1)       | (s0)       | (s1)

Split in two halves, one half's reduction runs on the second lane while the other half is computed. Each half waits for
its own reduction only, never for the lane. Unsplit, the same loop runs over one half, and nothing overlaps.

The embedding is divided over the vocabulary, so that layer 0 begins with a reduction like any other (onto a residual of
zeros). The last layer's reduction is the model's last norm. Nothing hides the first half's first reduction (but for the
second half's embedding) and the second half's last.
"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from tokenweave_models.tokenweave.batch import Batch, KVCache
from tokenweave_models.tokenweave.lanes import Lane, SameLane
from tokenweave_models.tokenweave.model import Compute, Decoder, Norm, TorchCompute, rotary_tables, vocabulary_range
from tokenweave_models.tokenweave.reduction import Reduction
from tokenweave_models.tokenweave.schedule import EMBED_LAYER, Observer, Step
from tokenweave_ops import SplitPlan


def tag_of(batch: Batch, plan: SplitPlan | None) -> int:
    """63 bits of what ranks must agree on in a pass: the plan, and which tokens of which requests the batch has."""
    agreed = (0 if plan is None else plan.hash, batch.query_lens, batch.kv_lens, batch.slots)
    return int.from_bytes(hashlib.blake2b(repr(agreed).encode(), digest_size=8).digest(), "big") >> 1


def unobserved(event: str, step: Step):
    return nullcontext()


class Executor:
    """A decoder with all it needs to run.

    Args:
        model: the decoder or a rank's share of it.
        cache: where its keys and values go.
        reduction: how sublayers end.
        lane: where reductions run when a plan splits the batch. Unsplit batches use the caller's lane.
        group: the ranks, to collect the logits' columns from; None for one process.
        compute: the matrix products and attention.

    Raises:
        ValueError: model, reduction and group are not of the same ranks, or a request of the cache does not fit the
            model's positions.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        reduction: Reduction,
        *,
        lane: Lane | None = None,
        group: dist.ProcessGroup | None = None,
        compute: Compute | None = None,
    ):
        ranks = {
            "model": (model.rank, model.world_size),
            "reduction": (model.rank if reduction.world_size == 1 else reduction.rank, reduction.world_size),
            "group": (0, 1) if group is None else (group.rank(), group.size()),
        }
        if len(set(ranks.values())) != 1:
            found = ", ".join(f"{name}: rank {rank} of {world_size}" for name, (rank, world_size) in ranks.items())
            raise ValueError(f"Executor: model, reduction and group must be of the same ranks, got {found}")
        if cache.max_len > model.config.max_len:
            raise ValueError(
                f"Executor: cache must hold at most the model's {model.config.max_len} positions, got {cache.max_len}"
            )
        config, itemsize = model.config, model.norm.weight.dtype.itemsize
        inner = config.intermediate // model.world_size
        if config.num_experts and (config.hidden * itemsize % 16 or inner * itemsize % 16):
            raise ValueError(
                f"Executor: rows of experts must be multiples of 16 bytes, got hidden={config.hidden} and "
                f"intermediate / world_size={inner} of {itemsize} bytes each"
            )
        self.model, self.cache, self.reduction, self.group = model, cache, reduction, group
        self.compute = TorchCompute() if compute is None else compute
        self._same_lane, self._second_lane = SameLane(), lane
        weight = model.norm.weight
        with torch.inference_mode(False):  # so that passes may run in inference mode and out of it
            self._rotary = rotary_tables(model.config, cache.max_len, weight.dtype, weight.device)
            self._residual = torch.empty(
                reduction.max_tokens, model.config.hidden, dtype=weight.dtype, device=weight.device
            )  # fmt: skip
        self._unfinished: Lane | None = None  # of a pass that was left by an exception
        # Of the pass's next reduction. None: there is none, or one has begun, which tells the others if it fails.
        self._next_channel: int | None = None

    def forward(self, batch: Batch, plan: SplitPlan | None = None, observe: Observer = unobserved) -> Tensor:
        """The normed rows [num_tokens, hidden] that the head reads. They lie in the reduction's memory until the next
        pass.

        A rank that raises, before a pass or in the middle of it, refuses its next reduction, so that the others raise
        RankDisagreement instead of waiting, and all are in step for the next pass. (Where a process group sums, they
        wait until its deadline.)

        Args:
            plan: how to split; None does not. All ranks need the same batch and plan: their reductions carry a hash of
                both, so that ranks that disagree get RankDisagreement.
            observe: is told of every step, a Schedule for example.
        """
        self._finish()
        self._unfinished, self._next_channel = self._same_lane, 0
        try:
            rows = self._checked(batch, plan)
            split = 0 if plan is None else plan.split
            lane = self._unfinished = self._second_lane if split else self._same_lane
            self._run(batch.split(split) if split else (batch,), rows, plan, lane, observe, tag_of(batch, plan))
        except Exception:
            self._finish()
            raise
        # Not after KeyboardInterrupt: the lane may wait for ranks that have left. The next pass settles it, if there is
        # one.
        self._unfinished = None
        return rows

    def _checked(self, batch: Batch, plan: SplitPlan | None) -> Tensor:
        """The rows of a pass that can be made, before anything is written."""
        self.cache.check(batch)
        if not batch.tokens.is_cuda:  # where tokens come from a GPU, who made them has checked them
            self.model.check_tokens(batch.tokens)
        if plan is not None and plan.num_tokens != batch.num_tokens:
            raise ValueError(
                f"Executor: plan must be made for the batch of {batch.num_tokens} tokens, got {plan.num_tokens}"
            )
        if plan is not None and plan.split:
            if self._second_lane is None:
                raise ValueError(f"Executor: a plan that splits needs a second lane, got none (split at {plan.split})")
            if self.reduction.num_channels < 2:
                raise ValueError("Executor: a plan that splits needs a reduction with 2 channels, got 1")
        return self.reduction.rows(batch.num_tokens)

    def _finish(self) -> None:
        """After a pass that was left by an exception: until nothing of it runs, and no other rank waits for it."""
        if self._unfinished is None:
            return
        self._unfinished.settle()
        self._unfinished = None
        if self._next_channel is not None:
            self.reduction.refuse(self._next_channel)

    def _run(
        self,
        halves: tuple[Batch, ...],
        all_rows: Tensor,
        plan: SplitPlan | None,
        lane: Lane,
        observe: Observer,
        tag: int,
    ) -> None:
        model, layers, eps = self.model, self.model.layers, self.model.config.norm_eps
        num_halves, num_tokens = len(halves), all_rows.shape[0]
        sizes = [half.num_tokens for half in halves]
        rows, residuals = all_rows.split(sizes), self._residual[:num_tokens].zero_().split(sizes)
        # The blocks of a reduction are those that the compute beside it spares: "attention" is beside either half's
        # attention, "mlp" beside its MLP. Nothing is beside an unsplit batch, the first half's first reduction and the
        # second half's last.
        ctas = {"attention": 0, "mlp": 0, "exposed": 0}
        if plan is not None:
            ctas = {"attention": plan.attention_ctas, "mlp": plan.mlp_ctas, "exposed": plan.exposed_ctas}
        last_half = num_halves - 1
        tickets: dict[int, tuple[Step, object]] = {}

        def reduce(step: Step, norm: Norm, beside: str) -> None:
            half, max_ctas = step.half, lane.max_ctas(ctas[beside if num_halves > 1 else "exposed"])

            is_last = norm is model.norm and half == last_half

            def work() -> None:
                with observe("reduce", step):
                    self._next_channel = None
                    self.reduction.reduce(
                        rows[half], residuals[half], norm.weight, eps, channel=step.channel, max_ctas=max_ctas, tag=tag
                    )
                    self._next_channel = None if is_last else (half + 1) % num_halves

            with observe("submit", step):
                tickets[half] = step, lane.submit(work)

        def wait(half: int) -> None:
            step, ticket = tickets[half]
            with observe("wait", step):
                lane.wait(ticket)

        for half, part in enumerate(halves):
            step = Step("embed", EMBED_LAYER, half, channel=half)
            with observe("compute", step):
                model.embed(part.tokens, out=rows[half])
            reduce(step, layers[0].input_layernorm, "exposed" if half == 0 else "attention")
        # Each sublayer's output is added by the norm that follows it: the next layer's first, or the model's last.
        next_norms = [layer.input_layernorm for layer in layers[1:]] + [model.norm]
        for index, (layer, next_norm) in enumerate(zip(layers, next_norms, strict=True)):
            for half, part in enumerate(halves):
                wait(half)
                step = Step("attention", index, half, channel=half)
                with observe("compute", step):
                    layer.self_attn(rows[half], part, index, self.cache, self._rotary, self.compute, out=rows[half])
                reduce(step, layer.post_attention_layernorm, "mlp" if half == last_half else "attention")
            for half in range(num_halves):
                wait(half)
                step = Step("mlp", index, half, channel=half)
                with observe("compute", step):
                    layer.mlp(rows[half], self.compute, out=rows[half])
                after = "exposed" if next_norm is model.norm else "attention"
                reduce(step, next_norm, after if half == last_half else "mlp")
        for half in range(num_halves):
            wait(half)

    def logits(self, rows: Tensor) -> Tensor:
        """[num_rows, vocab_size] of normed rows, the same bits on every rank. Collective."""
        own = self.model.logits(rows, self.compute)
        if self.group is None:
            return own
        vocab_size, world_size = self.model.config.vocab_size, self.model.world_size
        ranges = [vocabulary_range(vocab_size, world_size, rank) for rank in range(world_size)]
        widths = [end - begin for begin, end in ranges]
        padded = own.new_zeros(rows.shape[0], widths[0])
        padded[:, : own.shape[1]] = own
        parts = [torch.empty_like(padded) for _ in widths]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def close(self) -> None:
        if self._second_lane is not None:
            self._second_lane.close()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_exception) -> None:
        self.close()
