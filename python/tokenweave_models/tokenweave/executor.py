"""Runs a batch through a decoder: the order of sublayers and reductions, whole or in two halves.

    compute: | embed(s0) | embed(s1)   | attention(s0) | attention(s1) | mlp(s0)    | mlp(s1)    | attention(s0) ...
    reduce :             | (s0)        | (s1)          | (s0)          | (s1)       | (s0)       | (s1)

Split in two halves, one half's reduction runs on the second lane while the other half is computed. Each half waits for
its own reduction only, never for the lane. Unsplit, the same loop runs over one half, and nothing overlaps.

The embedding is divided over the vocabulary, so that layer 0 begins with a reduction like any other (onto a residual of
zeros). The last layer's reduction is the model's last norm; of it only the second half's is not hidden.
"""

from __future__ import annotations

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
        if (group is None) != (model.world_size == 1) or (group is not None and group.size() != model.world_size):
            raise ValueError(
                f"Executor: group must have the ranks of the model, got {group and group.size()} for {model.world_size}"
            )
        self.model, self.cache, self.reduction, self.group = model, cache, reduction, group
        self.compute = TorchCompute() if compute is None else compute
        self._same_lane, self._second_lane = SameLane(), lane
        weight = model.norm.weight
        self._rotary = rotary_tables(model.config, cache.max_len, weight.dtype, weight.device)
        self._residual = torch.empty(0, model.config.hidden, dtype=weight.dtype, device=weight.device)

    def forward(self, batch: Batch, plan: SplitPlan | None = None, observe: Observer = unobserved) -> Tensor:
        """The normed rows [num_tokens, hidden] that the head reads. They lie in the reduction's memory until the next
        pass.

        Args:
            plan: how to split; None does not. All ranks need the same: their reductions carry the number of tokens, so
                that ranks that disagree get RankDisagreement.
            observe: is told of every step, a Schedule for example.
        """
        self.cache.check(batch)
        split = 0 if plan is None else plan.split
        if plan is not None and plan.num_tokens != batch.num_tokens:
            raise ValueError(
                f"Executor: plan must be made for the batch of {batch.num_tokens} tokens, got {plan.num_tokens}"
            )
        if split and self._second_lane is None:
            raise ValueError(f"Executor: a plan that splits needs a second lane, got none (split at {split})")
        lane = self._second_lane if split else self._same_lane
        try:
            return self._run(batch.split(split) if split else (batch,), plan, lane, observe)
        except Exception:  # not KeyboardInterrupt: the other ranks may have left, and the lane may wait for them
            lane.settle()
            raise

    def _run(self, halves: tuple[Batch, ...], plan: SplitPlan | None, lane: Lane, observe: Observer) -> Tensor:
        model, layers, eps = self.model, self.model.layers, self.model.config.norm_eps
        num_tokens = sum(half.num_tokens for half in halves)
        all_rows, all_residuals = self.reduction.rows(num_tokens), self._zeros(num_tokens)
        sizes = [half.num_tokens for half in halves]
        rows, residuals = all_rows.split(sizes), all_residuals.split(sizes)
        # The blocks of a reduction are those that the compute beside it spares: "attention" is beside either half's
        # attention, "mlp" beside its MLP. Nothing is beside an unsplit batch, or the second half's last reduction.
        ctas = {"attention": 0, "mlp": 0, "exposed": 0}
        if len(halves) > 1:
            ctas = {"attention": plan.attention_ctas, "mlp": plan.mlp_ctas, "exposed": plan.exposed_ctas}
        tickets: dict[int, tuple[Step, object]] = {}

        def reduce(step: Step, norm: Norm, beside: str) -> None:
            half, max_ctas = step.half, lane.max_ctas(ctas[beside])

            def work() -> None:
                with observe("reduce", step):
                    self.reduction.reduce(
                        rows[half], residuals[half], norm.weight, eps, channel=step.channel, max_ctas=max_ctas
                    )

            with observe("submit", step):
                tickets[half] = step, lane.submit(work)

        def wait(half: int) -> None:
            step, ticket = tickets[half]
            with observe("wait", step):
                lane.wait(ticket)

        last_half = len(halves) - 1
        for half, part in enumerate(halves):
            step = Step("embed", EMBED_LAYER, half, channel=half)
            with observe("compute", step):
                model.embed(part.tokens, out=rows[half])
            reduce(step, layers[0].input_layernorm, "attention")
        # Each sublayer's output is added by the norm that follows it: the next layer's first, or the model's last.
        next_norms = [layer.input_layernorm for layer in layers[1:]] + [model.norm]
        for index, (layer, next_norm) in enumerate(zip(layers, next_norms, strict=True)):
            for half, part in enumerate(halves):
                wait(half)
                step = Step("attention", index, half, channel=half)
                with observe("compute", step):
                    layer.self_attn(rows[half], part, index, self.cache, self._rotary, self.compute, out=rows[half])
                reduce(step, layer.post_attention_layernorm, "mlp" if half == last_half else "attention")
            for half in range(len(halves)):
                wait(half)
                step = Step("mlp", index, half, channel=half)
                with observe("compute", step):
                    layer.mlp(rows[half], self.compute, out=rows[half])
                after = "exposed" if next_norm is model.norm else "attention"
                reduce(step, next_norm, after if half == last_half else "mlp")
        for half in range(len(halves)):
            wait(half)
        return all_rows

    def _zeros(self, num_tokens: int) -> Tensor:
        if num_tokens > self._residual.shape[0]:
            self._residual = self._residual.new_empty(num_tokens, self._residual.shape[1])
        return self._residual[:num_tokens].zero_()

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
