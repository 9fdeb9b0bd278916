"""Family anchor_decoding: one step of decoding a masked diffusion language model, for a whole batch at once.

Each sequence has a current block of ``block_length`` positions, some of which hold the mask id. For each masked
position one pass over its row of logits finds the candidate token and how sure the model is of it; the sequence's
policy then chooses which candidates are committed: written to ``tokens``, for good.

Policies. c is the confidence, n the rank (from 1) in the policy's order, M the number of candidates; "first" is the
candidate of rank 1. Every policy commits at least one candidate where there is one.

===================  ==============================================================  ==================================
policy               commits                                                         threshold, others; source
===================  ==============================================================  ==================================
topk                 the ceil(M / steps_left) largest c                              LLaDA's linear schedule
topk_margin          the same, ordered by margin                                     Dream
topk_entropy         the same, ordered by entropy, smallest first                    Dream
threshold            first, and c >= theta                                           0.9; Fast-dLLM
factor               ranks n while c(n) >= 1 - f / (n + 1), from rank 2 on           f = 1; Fast-dLLM
local_leap           first, and c >= tau within W of an anchor (c >= kappa),         0.9, tau 0.75, W 4; LocalLeap
                     c >= kappa elsewhere
eb                   by entropy: n while the entropies before it sum to <= gamma     0.001; EB-Sampler
entropy_threshold    first by entropy, and entropy <= h                              0.45; d3LLM
margin               first by margin, and margin >= theta                            0.9
klass                c >= theta where the distribution was stable for two steps       0.6, epsilon 0.01 nats; KLASS
                     (divergence < epsilon); if there is none, as topk
===================  ==============================================================  ==================================

Sources: LocalLeap, arXiv 2510.07081 (algorithm 1); Fast-dLLM, arXiv 2505.22618; EB-Sampler, arXiv 2505.24857; LLaDA,
arXiv 2502.09992. `factor` is the published code's form, where a last candidate that alone fails is committed as well.

Numeric contract, met by every backend:

- The candidate is the id of the largest logit; with temperature T > 0, of the largest ``logit + T * g``, g standard
  Gumbel noise, which draws from softmax(logits / T). Never the mask id nor a forbidden one. Equal logits: lowest id.
- Confidence is ``exp(l[candidate] - max) / sum(exp(l - max))`` of the untempered row, over ids below ``vocab_limit``
  without the forbidden ones; the mask id counts in the sum, as it does in the published code. fp32 throughout: relative
  error below 1e-5, at most 1, and at least the smallest normal fp32 number. entropy (nats), margin (of the two largest
  probabilities among allowed ids) and divergence (KL from the row of the step before, nats): absolute error below 1e-5
  of their largest term.
- Thresholds are fp32 numbers and compared with fp32 statistics. ``exact=True`` computes the confidence anew in float64
  where it is within 1e-5 of a threshold that the request's policy compares it with (of either, in a scan alone),
  rounded toward zero, so that the comparison is the float64 one.
- Ranks are strict: equal statistics go by position, lowest first. Windows reach over the block, not beyond.
- A NaN logit counts as -inf. A row without a finite maximum (all -inf, or a +inf; a maximum from 2^23 on, or below
  -2^23, counts as infinite) has confidence 0, entropy and divergence inf, margin 0, and the lowest id of the largest
  logit for a candidate; it is counted in ``num_bad_rows``. A row in which no id is allowed has no candidate.
- A deferred id may be a candidate, but ranks last: its confidence is the smallest normal number, its entropy inf, its
  margin 0.
- Noise is Philox4x32-10, key seed, counter (id / 4, place in the block, step), word id % 4: a sequence decodes the same
  in any batch, wherever padding puts it.
- Rows are summed in pieces of a fixed number of ids, added up in order: same inputs, same bits, whatever the batch, the
  features, the grid or the number of threads. Between backends and instruction sets bits may differ.
- Tensors that are written must not overlap any other argument.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, is_grad_enabled

from tokenweave_ops._decode_requests import DecodeRequests
from tokenweave_ops._library import define_op

MAX_BLOCK_LENGTH = 1024
MAX_LISTED_IDS = 16  # of forbidden ids, and of deferred ids

# What stands in counts[:, 3]: 1 << place. The words complete "request 3: ...".
PROBLEMS = (
    "block_start must leave the whole block within the sequence",
    "policy must be a number of tokenweave_ops.POLICIES",
    "the policy, or a temperature above 0, needs a feature that `features` lacks",
    "threshold and relaxed_threshold must not be NaN",
    "radius must be at least 0",
    "temperature must be 0 to 1e30",
    "steps_left must be at least 1",
    "rows must name rows of logits",
)


# ---------------------------------------------------------------------------------------------- schemas, fake kernels


def _empty_scan(logits: Tensor, stable_steps: Tensor) -> tuple[Tensor, Tensor]:
    candidates = logits.new_empty(stable_steps.shape, dtype=torch.int64)
    return candidates, logits.new_empty((*stable_steps.shape, 4), dtype=torch.float32)


def _empty_commit(candidates: Tensor) -> tuple[Tensor, Tensor]:
    counts = candidates.new_empty((candidates.shape[0], 4), dtype=torch.int64)
    return counts, candidates.new_empty(candidates.shape, dtype=torch.bool)


def _fake_decode_step(
    logits, tokens, block_start, policy, threshold, relaxed_threshold, radius, temperature, seed, step, steps_left,
    stable_steps, *_
):  # fmt: skip
    candidates, statistics = _empty_scan(logits, stable_steps)
    return *_empty_commit(candidates), candidates, statistics


def _fake_confidence_scan(
    logits, tokens, block_start, threshold, relaxed_threshold, temperature, seed, step, stable_steps, *_
):
    return _empty_scan(logits, stable_steps)


define_op(
    "decode_step_(Tensor logits, Tensor(a!) tokens, Tensor block_start, Tensor policy, Tensor threshold,"
    " Tensor relaxed_threshold, Tensor radius, Tensor temperature, Tensor seed, Tensor(b!) step, Tensor(c!) steps_left,"
    " Tensor(d!) stable_steps, Tensor(e!) tickets, Tensor? rows, Tensor? forbidden, Tensor? deferred,"
    " Tensor? previous_logits, int mask_id, int vocab_limit, int features, bool exact)"
    " -> (Tensor counts, Tensor committed, Tensor candidates, Tensor statistics)",
    fake=_fake_decode_step,
)
define_op(
    "confidence_scan(Tensor logits, Tensor tokens, Tensor block_start, Tensor threshold, Tensor relaxed_threshold,"
    " Tensor temperature, Tensor seed, Tensor step, Tensor stable_steps, Tensor(a!) tickets, Tensor? rows,"
    " Tensor? forbidden, Tensor? deferred, Tensor? previous_logits, int mask_id, int vocab_limit, int features,"
    " bool exact) -> (Tensor candidates, Tensor statistics)",
    fake=_fake_confidence_scan,
)
define_op(
    "select_and_commit_(Tensor candidates, Tensor statistics, Tensor(a!) tokens, Tensor block_start, Tensor policy,"
    " Tensor threshold, Tensor relaxed_threshold, Tensor radius, Tensor temperature, Tensor(b!) step,"
    " Tensor(c!) steps_left, Tensor(d!) stable_steps, int mask_id, int features) -> (Tensor counts, Tensor committed)",
    fake=lambda candidates, *_: _empty_commit(candidates),
)

_increment_versions = torch._C._increment_version

_decode_step_ = torch.ops.tokenweave.decode_step_.default
_confidence_scan = torch.ops.tokenweave.confidence_scan.default
_select_and_commit_ = torch.ops.tokenweave.select_and_commit_.default


def _vocab(logits: Tensor) -> int:
    return logits.shape[-1] if logits.dim() > 0 else 0  # which the op then refuses


def _refuse_grad(op: str) -> None:
    raise RuntimeError(f"{op}: logits require grad, but choosing tokens has no gradient; call it under torch.no_grad()")


# ----------------------------------------------------------------------------------------------------- public functions


class RowScan(NamedTuple):
    """What a scan found, for each position of each sequence's block.

    Attributes:
        candidates: int64 ``[batch, block_length]``; -1 where the position is not masked or has no row (-2: its entry
            in `rows` names no row).
        statistics: fp32 ``[batch, block_length, 4]``: confidence, entropy, margin, divergence; what was not asked for,
            and where there is no candidate, is NaN.
    """

    candidates: Tensor
    statistics: Tensor


class DecodeStep(NamedTuple):
    """What a step did.

    Attributes:
        counts: int64 ``[batch, 4]``: tokens committed, masks that remain in the block, rows without a finite maximum,
            problems (bits, see :meth:`raise_problems`). One tensor, so that one copy to pinned memory polls them all.
        committed: bool ``[batch, block_length]``.
        candidates, statistics: as in :class:`RowScan`; the candidates are what was committed.
    """

    counts: Tensor
    committed: Tensor
    candidates: Tensor
    statistics: Tensor

    @property
    def num_committed(self) -> Tensor:
        return self.counts[:, 0]

    @property
    def num_remaining(self) -> Tensor:
        return self.counts[:, 1]

    @property
    def num_bad_rows(self) -> Tensor:
        return self.counts[:, 2]

    def raise_problems(self) -> None:
        """Raises for requests that a GPU skipped because their numbers made no sense. Waits for the device.

        On a CPU the step itself raises, before it writes anything.

        Raises:
            RuntimeError: names the first such request and its problem.
        """
        problems = self.counts[:, 3].cpu()
        for request in problems.nonzero().flatten().tolist():
            place = (int(problems[request]) & -int(problems[request])).bit_length() - 1
            raise RuntimeError(f"decode_step_: request {request}: {PROBLEMS[place]}")


def decode_step_(
    logits: Tensor,
    tokens: Tensor,
    requests: DecodeRequests,
    *,
    mask_id: int,
    rows: Tensor | None = None,
    forbidden: Tensor | None = None,
    deferred: Tensor | None = None,
    previous_logits: Tensor | None = None,
    vocab_limit: int | None = None,
    exact: bool = False,
) -> DecodeStep:
    """One decoding step of every sequence: scan the rows of masked positions, select, write tokens in place.

    One launch, no synchronisation, CUDA-graph capturable; rows of positions that are not masked are not read, and a
    sequence without masks in its block is left alone. Policies and numerics: the module's contract. No gradient.

    Args:
        logits: bf16, fp16 or fp32, last dimension contiguous, vocabulary of at least 2. Without `rows`:
            ``[batch, block_length, vocab]``, one row for each position of the block. With `rows`: ``[..., vocab]``, any
            number of rows whose leading dimensions fold into at most two strides.
        tokens: int64 ``[batch, length]``, contiguous last dimension; written.
        requests: policies, numbers and state of the batch; the state is written.
        mask_id: the id that marks a position as not decoded yet; never committed.
        rows: int64 ``[batch, block_length]``, the row of logits that predicts each position, for models whose row p - 1
            predicts position p and for heads computed on some rows only. Negative: no row, the position waits.
        forbidden: int64 ``[n]``, n up to 16, ids that are never chosen and do not count in the softmax; ids outside
            the vocabulary have no effect.
        deferred: int64 ``[n]``, n up to 16, ids that rank last.
        previous_logits: like logits, for klass: row r is that of row r of logits, one step earlier.
        vocab_limit: ids from here on are padding of the table, as if forbidden. Default: all are real.
        exact: decides in float64 where fp32 is too close to a threshold to call.

    Returns:
        Counts, commit mask, candidates and statistics. The last three cost 25 bytes a position, next to nothing beside
        a row, so they are always there.

    Raises:
        RuntimeError: an argument does not fit, or, on a CPU, a request's numbers do not make sense; nothing has been
            written then. On a GPU such a request is skipped and :meth:`DecodeStep.raise_problems` raises later.
    """
    if logits.requires_grad and is_grad_enabled():
        _refuse_grad("decode_step_")
    r = requests
    result = _decode_step_(
        logits, tokens, r.block_start, r.policy, r.threshold, r.relaxed_threshold, r.radius, r.temperature, r.seed,
        r.step, r.steps_left, r.stable_steps, r.tickets, rows, forbidden, deferred, previous_logits,
        mask_id, _vocab(logits) if vocab_limit is None else vocab_limit, r.feature_mask, exact,
    )  # fmt: skip
    _increment_versions((tokens,))
    return DecodeStep(*result)


def confidence_scan(
    logits: Tensor,
    tokens: Tensor,
    requests: DecodeRequests,
    *,
    mask_id: int,
    rows: Tensor | None = None,
    forbidden: Tensor | None = None,
    deferred: Tensor | None = None,
    previous_logits: Tensor | None = None,
    vocab_limit: int | None = None,
    exact: bool = False,
) -> RowScan:
    """The first half of :func:`decode_step_`, for a selection rule of one's own: same arguments, nothing committed.

    A request whose numbers make no sense has no candidates.

    Raises:
        RuntimeError: as decode_step_.
    """
    if logits.requires_grad and is_grad_enabled():
        _refuse_grad("confidence_scan")
    r = requests
    return RowScan(*_confidence_scan(
        logits, tokens, r.block_start, r.threshold, r.relaxed_threshold, r.temperature, r.seed, r.step, r.stable_steps,
        r.tickets, rows, forbidden, deferred, previous_logits,
        mask_id, _vocab(logits) if vocab_limit is None else vocab_limit, r.feature_mask, exact,
    ))  # fmt: skip


def select_and_commit_(scan: RowScan, tokens: Tensor, requests: DecodeRequests, *, mask_id: int) -> DecodeStep:
    """The second half of :func:`decode_step_`, for statistics of one's own.

    Args:
        scan: candidates and statistics as :func:`confidence_scan` gives them, contiguous. A candidate that is negative
            or the mask id, or whose position is not masked, is ignored; but -2 on a masked position is the problem with
            `rows` that the scan met. Statistics must not be NaN where the request's policy reads them.
        tokens, requests, mask_id: as for decode_step_.

    Raises:
        RuntimeError: as decode_step_.
    """
    r = requests
    counts, committed = _select_and_commit_(
        scan.candidates, scan.statistics, tokens, r.block_start, r.policy, r.threshold, r.relaxed_threshold, r.radius,
        r.temperature, r.step, r.steps_left, r.stable_steps, mask_id, r.feature_mask,
    )  # fmt: skip
    _increment_versions((tokens,))
    return DecodeStep(counts, committed, scan.candidates, scan.statistics)
