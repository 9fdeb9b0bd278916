"""What the tests of family anchor_decoding share: inputs, a call on any backend, and what must come out of it.

Two oracles: :func:`expect` is the float64 reference of the whole step, for inputs on which no statistic lies at a
threshold; :func:`expect_selection` selects from the fp32 statistics that an op itself found, and needs no such care.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from tokenweave_ops import POLICIES, DecodeRequests, RowScan, testing
from tokenweave_ops.reference import anchor_decoding as reference

family = testing.family("anchor_decoding")

MASK = 1  # the mask id of most tests; 0 would be found by a kernel that forgets to look
RELATIVE_ERROR = 1e-5  # of statistics, as the contract states it
STATISTICS = ("confidence", "entropy", "margin", "divergence")
ALL_FEATURES = ("entropy", "margin", "sampling", "divergence")
# Of every policy, a number that lets some candidates pass and some fail.
THRESHOLD = {"threshold": 0.7, "factor": 1.0, "local_leap": 0.8, "eb": 1.0, "entropy_threshold": 0.8, "margin": 0.6}


def copied(value, device: str):
    if isinstance(value, Tensor):
        return value.clone().to(device)
    if isinstance(value, DecodeRequests):
        return DecodeRequests(**{f.name: copied(getattr(value, f.name), device) for f in fields(value)})
    return value


@dataclass
class Inputs:
    """Arguments of a step, on the CPU. No call changes them: :meth:`on` gives what a call gets."""

    logits: Tensor
    tokens: Tensor
    requests: DecodeRequests
    mask_id: int = MASK
    options: dict = field(default_factory=dict)  # rows, forbidden, deferred, previous_logits, vocab_limit, exact

    def on(self, device: str) -> Inputs:
        """A copy that shares no memory with this one."""
        options = {name: copied(value, device) for name, value in self.options.items()}
        tensors = (copied(value, device) for value in (self.logits, self.tokens, self.requests))
        return Inputs(*tensors, self.mask_id, options)

    def but(self, **changes) -> Inputs:
        """The same with other requests' numbers, tensors or options."""
        new = self.on("cpu")
        for name, value in changes.items():
            if name in ("logits", "tokens", "requests", "mask_id"):
                setattr(new, name, value)
            elif hasattr(new.requests, name):
                setattr(new.requests, name, value)
            else:
                new.options[name] = value
        return new

    def of(self, *requests: int) -> Inputs:
        """A batch of some of the requests, in this order; the logits must be one row a position."""
        chosen = list(requests)
        new = self.on("cpu")
        new.logits, new.tokens = new.logits[chosen].clone(), new.tokens[chosen].clone()
        for f in fields(new.requests):
            if isinstance(value := getattr(new.requests, f.name), Tensor):
                setattr(new.requests, f.name, value[chosen].clone())
        if isinstance(previous := new.options.get("previous_logits"), Tensor):
            new.options["previous_logits"] = previous[chosen].clone()
        return new


@dataclass
class Outcome:
    """All that a step returns and writes, on the CPU."""

    counts: Tensor
    committed: Tensor
    candidates: Tensor
    statistics: Tensor
    tokens: Tensor
    step: Tensor
    steps_left: Tensor
    stable_steps: Tensor

    def __eq__(self, other: Outcome) -> bool:
        """Bit for bit; NaN equals NaN."""
        return all(torch.equal(_bits(getattr(self, f.name)), _bits(getattr(other, f.name))) for f in fields(self))

    def of(self, *requests: int) -> Outcome:
        return Outcome(**{f.name: getattr(self, f.name)[list(requests)] for f in fields(self)})


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32) if tensor.dtype == torch.float32 else tensor


def _outcome(result, tokens: Tensor, r: DecodeRequests) -> Outcome:
    assert not r.tickets.any(), "tickets must be zero after a call"
    found = (*result, tokens, r.step, r.steps_left, r.stable_steps)
    return Outcome(*(tensor.cpu() for tensor in found))


# ----------------------------------------------------------------------------------------------------------- the calls


def decode(backend, inputs: Inputs) -> Outcome:
    """decode_step_ on copies of the inputs."""
    given = inputs.on(backend.device)
    with backend.use(family):
        step = family.decode_step_(given.logits, given.tokens, given.requests, mask_id=given.mask_id, **given.options)
    return _outcome(step, given.tokens, given.requests)


def scan(backend, inputs: Inputs) -> RowScan:
    given = inputs.on(backend.device)
    with backend.use(family):
        found = family.confidence_scan(
            given.logits, given.tokens, given.requests, mask_id=given.mask_id, **given.options
        )
    assert not given.requests.tickets.any(), "tickets must be zero after a call"
    assert torch.equal(given.tokens.cpu(), inputs.tokens), "a scan commits nothing"
    return RowScan(*(tensor.cpu() for tensor in found))


def select(backend, found: RowScan, tokens: Tensor, requests: DecodeRequests, mask_id: int = MASK) -> Outcome:
    """select_and_commit_ on copies of the arguments."""
    found = RowScan(*(copied(tensor, backend.device) for tensor in found))
    tokens, requests = copied(tokens, backend.device), copied(requests, backend.device)
    with backend.use(family):
        step = family.select_and_commit_(found, tokens, requests, mask_id=mask_id)
    return _outcome(step, tokens, requests)


# --------------------------------------------------------------------------------------------------------- the oracles


def expect(inputs: Inputs) -> Outcome:
    """What the float64 reference makes of the inputs; statistics are float64."""
    given = inputs.on("cpu")
    result = reference.decode_step_(given.logits, given.tokens, given.requests, mask_id=given.mask_id, **given.options)
    return _outcome(result, given.tokens, given.requests)


def expect_selection(found: RowScan, tokens: Tensor, requests: DecodeRequests, mask_id: int = MASK) -> Outcome:
    """What must be committed, given candidates and statistics."""
    tokens, r = tokens.clone(), requests.clone()
    counts, committed = (
        torch.zeros(r.batch, 4, dtype=torch.int64),
        torch.zeros(found.candidates.shape, dtype=torch.bool),
    )
    for b in range(r.batch):
        start, policy = int(r.block_start[b]), POLICIES[int(r.policy[b])]
        masked = [j for j in range(r.block_length) if tokens[b, start + j] == mask_id]
        values = {
            j: found.statistics[b, j].tolist() for j in masked if int(found.candidates[b, j]) not in (-2, -1, mask_id)
        }
        if policy == "klass":
            for j in values:
                seen = int(r.stable_steps[b, j])
                is_stable = seen >= 0 and values[j][3] < float(r.relaxed_threshold[b])
                r.stable_steps[b, j] = seen + 1 if is_stable else 0
        chosen = reference.select(
            policy,
            values,
            threshold=float(r.threshold[b]),
            relaxed_threshold=float(r.relaxed_threshold[b]),
            radius=int(r.radius[b]),
            steps_left=int(r.steps_left[b]),
            stable={j for j in values if r.stable_steps[b, j] >= 2},
        )
        for j in chosen:
            committed[b, j] = True
            tokens[b, start + j] = found.candidates[b, j]
        if values:
            r.step[b] += 1
            r.steps_left[b] = max(1, int(r.steps_left[b]) - 1)
        bad = sum(v[0] == 0 for v in values.values())
        counts[b] = torch.tensor([len(chosen), len(masked) - len(chosen), bad, 0])
    return Outcome(counts, committed, found.candidates, found.statistics, tokens, r.step, r.steps_left, r.stable_steps)


def assert_selected(outcome: Outcome, inputs: Inputs) -> None:
    """The step committed what its own statistics call for."""
    found = RowScan(outcome.candidates, outcome.statistics)
    assert outcome == expect_selection(found, inputs.tokens, inputs.requests, inputs.mask_id)


def assert_matches_reference(outcome: Outcome, inputs: Inputs) -> None:
    """Everything equals the reference, the statistics within the contract's error."""
    expected = expect(inputs)
    assert torch.equal(outcome.candidates, expected.candidates)
    assert_statistics_close(outcome.statistics, expected, inputs)
    for name in ("counts", "committed", "tokens", "step", "steps_left", "stable_steps"):
        assert torch.equal(getattr(outcome, name), getattr(expected, name)), name


def assert_statistics_close(actual: Tensor, expected: Outcome, inputs: Inputs) -> None:
    """Within RELATIVE_ERROR of the largest term of each sum; NaN exactly where nothing was asked for or found."""
    wanted = expected.candidates >= 0
    asked = {"confidence", *inputs.requests.features}
    largest = largest_terms(inputs)
    for column, name in enumerate(STATISTICS):
        got, exact = actual[..., column].double(), expected.statistics[..., column]
        present = wanted if name in asked else torch.zeros_like(wanted)
        assert torch.equal(~got.isnan(), present), f"{name}: NaN where it should not be, or not where it should"
        got, exact = got[present], exact[present]
        assert torch.equal(got.isinf(), exact.isinf()), (
            f"{name}: infinite where it should not be, or the other way round"
        )
        scale = exact.abs() if name == "confidence" else largest[name][present]
        error = ((got - exact).abs() / scale)[exact.isfinite() & (got != exact)]
        assert error.numel() == 0 or error.max() <= RELATIVE_ERROR, f"{name}: relative error {error.max():.2e}"
    confidence = actual[..., 0][wanted]
    assert (confidence <= 1).all()
    assert ((confidence == 0) | (confidence >= torch.finfo(torch.float32).tiny)).all()


def largest_terms(inputs: Inputs) -> dict[str, Tensor]:
    """[batch, block_length] for each statistic but the confidence: the largest term of its sum, at least 1 where it is
    a logarithm, as a logarithm near 0 has the absolute error of one near 1."""
    vocab = inputs.logits.shape[-1]
    r = inputs.requests
    rows = inputs.options.get("rows")
    if rows is None:
        rows = torch.arange(r.batch * r.block_length).view(r.batch, r.block_length)

    def log_p(logits: Tensor) -> tuple[Tensor, Tensor]:
        table = logits.reshape(-1, vocab)[rows.clamp(min=0)].double().nan_to_num(nan=-math.inf, neginf=-math.inf)
        table[..., inputs.options.get("vocab_limit", vocab) :] = -math.inf
        if (forbidden := inputs.options.get("forbidden")) is not None:
            table[..., forbidden[(forbidden >= 0) & (forbidden < vocab)]] = -math.inf
        table -= table.amax(dim=-1, keepdim=True)  # as the kernels see it
        log_sum = table.logsumexp(dim=-1)
        return table, log_sum

    table, log_sum = log_p(inputs.logits)
    p = (table - log_sum[..., None]).exp()
    p[..., inputs.mask_id] = 0
    terms = {"entropy": log_sum.clamp(min=1), "margin": p.amax(dim=-1), "divergence": log_sum.clamp(min=1)}
    if (previous := inputs.options.get("previous_logits")) is not None:
        before, log_sum_before = log_p(previous)
        moved = (p * (table - before).nan_to_num(posinf=0, neginf=0)).sum(dim=-1).abs()
        terms["divergence"] = torch.maximum(torch.maximum(log_sum, log_sum_before), moved).clamp(min=1)
    return terms


# --------------------------------------------------------------------------------------------------------- the inputs


def peaked_logits(*shape: int, seed: int, dtype: torch.dtype = torch.float32, least: float = 0.05) -> Tensor:
    """Rows of noise with one peak each, whose probability is anywhere from `least` to 0.999. Never the mask id."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, generator=generator, dtype=torch.float64)
    vocab = shape[-1]
    p = least + (0.999 - least) * torch.rand(*shape[:-1], generator=generator, dtype=torch.float64)
    peak = torch.randint(vocab - 1, shape[:-1], generator=generator)
    peak += peak >= MASK
    rest = logits.scatter(-1, peak[..., None], -math.inf).logsumexp(dim=-1)
    logits.scatter_(-1, peak[..., None], (rest + (p / (1 - p)).log())[..., None])
    return logits.to(dtype)


def rows_of_confidence(confidence: Tensor, vocab: int = 64) -> Tensor:
    """fp32 rows whose most probable id has exactly these probabilities, up to rounding; the id is 2 + its place."""
    rest = ((1 - confidence.double()) / (vocab - 1)).log()
    logits = rest[..., None].expand(*confidence.shape, vocab).clone()
    place = 2 + torch.arange(confidence.numel()).view(confidence.shape) % (vocab - 2)
    return logits.scatter_(-1, place[..., None], confidence.double().log()[..., None]).float()


def block_tokens(batch: int, length: int, vocab: int, seed: int, masked: float = 0.7, mask_id: int = MASK) -> Tensor:
    """Tokens of which a share is masked, anywhere in the sequence; the first of a sequence always is."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (batch, length), generator=generator)
    tokens[tokens == mask_id] = 0 if mask_id else vocab - 1
    tokens[torch.rand(batch, length, generator=generator) < masked] = mask_id
    return tokens


def make_inputs(
    batch: int,
    block_length: int,
    vocab: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    masked: float = 0.7,
    policy: str | list[str] = "local_leap",
    noise_seed: int | list[int] = 0,
    **numbers,
) -> Inputs:
    """A random step in which each sequence has its own block, and positions before and after it."""
    names = [policy] * batch if isinstance(policy, str) else policy
    numbers.setdefault("threshold", [THRESHOLD.get(name, 0.5) for name in names])
    numbers.setdefault("relaxed_threshold", [0.4 if name == "local_leap" else 0.01 for name in names])
    numbers.setdefault("radius", 2)
    numbers.setdefault("steps", max(1, block_length // 3))
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(6, (batch,), generator=generator)
    requests = DecodeRequests.make(batch, block_length, policy=names, block_start=start, seed=noise_seed, **numbers)
    tokens = block_tokens(batch, block_length + 7, vocab, seed + 1, masked)
    options = {}
    if "divergence" in requests.features:
        # Some positions have a step before, whose rows are hardly others; some of those were stable before.
        requests.stable_steps = torch.randint(-1, 3, (batch, block_length), generator=generator)
        before = peaked_logits(batch, block_length, vocab, seed=seed + 2)
        wobble = torch.rand(batch, block_length, 1, generator=generator) * 0.3
        options["previous_logits"] = (before + wobble * torch.randn(before.shape, generator=generator)).to(dtype)
    logits = peaked_logits(batch, block_length, vocab, seed=seed + 2, dtype=dtype)
    return Inputs(logits, tokens, requests, options=options)


def all_policies(block_length: int, vocab: int, **options) -> Inputs:
    """A batch of every policy, all statistics on."""
    return make_inputs(len(POLICIES), block_length, vocab, policy=list(POLICIES), features=ALL_FEATURES, **options)
