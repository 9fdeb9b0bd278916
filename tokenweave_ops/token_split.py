"""Where to split the tokens of a batch, and whether to: :func:`plan_token_split`.

Pure functions of their arguments: no device is asked, and every rank that asks the same gets the same. The model behind
the predictions is described in docs/planner.md.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenweave_ops._cost_model import CostModel, attention_calls, attention_halves, gemm_us, overlap_us, weave_times
from tokenweave_ops._hardware import H100, HardwareProfile, LinkModel, cpu_profile

__all__ = [
    "H100",
    "HardwareProfile",
    "LinkModel",
    "ModelShape",
    "Pair",
    "SplitOverride",
    "SplitPlan",
    "WeavePass",
    "cpu_profile",
    "gemm_us",
    "load_overrides",
    "plan_gemm_split",
    "plan_token_split",
    "published_split",
    "weave_pass",
]

# Of the tokens, in the smaller half. TokenWeave's tuned tables stay above 0.43.
MIN_HALF = 0.37
MAX_CANDIDATES = 32
AS_GOOD = 1e-3
# TokenWeave's own rule.
PUBLISHED_MIN_TOKENS = 1024
PUBLISHED_PADDING = 256
# Of one collective: what the fused kernels take at most.
MAX_CTAS = 128
KINDS = ("none", "fuse", "split")
LAUNCHES = ("graph", "eager")


def _integer(what: str, name: str, value: object, low: int, high: int | None = None) -> int:
    """``value`` as a plain int: numpy's too are welcome, but equal plans must have equal hashes."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
        if number < low or (high is not None and number > high):
            raise TypeError
    except TypeError:
        wanted = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{what}: {name} must be an integer {wanted}, got {value!r}") from None
    return number


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a whole decoder, before it is divided over ranks. ``num_experts`` 0 means a dense MLP."""

    hidden: int
    intermediate: int  # of one expert, if there are experts
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_experts: int = 0
    experts_per_token: int = 0
    element_bytes: int = 2

    def __post_init__(self):
        for name, value in vars(self).items():
            low = 0 if name in ("num_experts", "experts_per_token") else 1
            object.__setattr__(self, name, _integer("ModelShape", name, value, low))
        if bool(self.num_experts) != bool(self.experts_per_token) or self.experts_per_token > self.num_experts:
            raise ValueError(
                f"ModelShape: experts_per_token must be in [1, num_experts={self.num_experts}] (both 0: dense), "
                f"got {self.experts_per_token}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelShape: num_kv_heads must divide num_heads={self.num_heads}, got {self.num_kv_heads}"
            )

    def check_world_size(self, world_size: int) -> int:
        """Returns it; raises ValueError if so many ranks cannot share heads and inner features evenly."""
        world_size = _integer("ModelShape", "world_size", world_size, 1)
        for name in ("num_heads", "num_kv_heads", "intermediate"):
            if getattr(self, name) % world_size:
                raise ValueError(f"ModelShape: world_size {world_size} must divide {name}={getattr(self, name)}")
        return world_size


@dataclass(frozen=True)
class SplitPlan:
    """What to do with a batch of ``num_tokens`` rows.

    kind:
        "none": one rank, or nothing to gain; "fuse": one pass, fused all-reduce and norm; "split": two halves that
        overlap.
    split: rows of the first half; 0 unless kind is "split".
    attention_ctas, mlp_ctas: CTAs of the collectives that run beside attention and beside the MLP; 0 unless split.
    exposed_ctas: CTAs of the collectives that nothing hides.
    launch: "graph" or "eager", which host costs the prediction counts.
    predicted_us: of the whole forward pass, by mode: "reference" (all-reduce, add, norm), "fused", "no_communication"
        (reference without its all-reduces: wrong results), and "weave" if the batch can be split.

    Raises ValueError for fields that contradict each other.
    """

    num_tokens: int
    kind: str
    split: int
    attention_ctas: int
    mlp_ctas: int
    exposed_ctas: int
    launch: str
    predicted_us: Mapping[str, float] = field(compare=False)

    def __post_init__(self):
        for name in ("num_tokens", "split", "attention_ctas", "mlp_ctas", "exposed_ctas"):
            number = _integer("SplitPlan", name, getattr(self, name), int(name == "num_tokens"))
            object.__setattr__(self, name, number)
        if self.kind not in KINDS:
            raise ValueError(f"SplitPlan: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.launch not in LAUNCHES:
            raise ValueError(f"SplitPlan: launch must be one of {', '.join(LAUNCHES)}, got {self.launch!r}")
        if self.kind != "split" and self.split:
            raise ValueError(f"SplitPlan: split must be 0 where kind is {self.kind!r}, got {self.split}")
        if self.kind == "split" and not 0 < self.split < self.num_tokens:
            raise ValueError(f"SplitPlan: split must be inside the batch, 1 to {self.num_tokens - 1}, got {self.split}")

    @property
    def hash(self) -> int:
        """63 bits of what the ranks must agree on, not of the predictions: equal for equal plans, in every process."""
        agreed = (self.num_tokens, self.kind, self.split, self.attention_ctas, self.mlp_ctas, self.exposed_ctas)
        digest = hashlib.blake2b(repr(agreed).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class SplitOverride:
    """One row of a table that replaces the planner's choice: TokenWeave's own way to say where to split."""

    offset: int  # rows by which the first half is longer than half of the padded batch
    attention_ctas: int
    mlp_ctas: int

    def __post_init__(self):
        object.__setattr__(self, "offset", _integer("SplitOverride", "offset", self.offset, 0))
        for name in ("attention_ctas", "mlp_ctas"):
            object.__setattr__(self, name, _integer("SplitOverride", name, getattr(self, name), 1, MAX_CTAS))


def _padded(num_tokens: int) -> int:
    return -(-num_tokens // PUBLISHED_PADDING) * PUBLISHED_PADDING


def published_split(num_tokens: int, offset: int = 0) -> tuple[int, int, int, int]:
    """TokenWeave's rule for batches of at least 1024 tokens: (padded, split, padded_rest, rest).

    The batch is padded to a multiple of 256; its first ``split = padded / 2 + offset`` rows are the first half, and
    ``rest`` of the ``padded_rest`` others are real. The published tables have offsets of 0, 128 and 256.

    Raises ValueError if the batch is smaller, or the split leaves no real row to the second half.
    """
    num_tokens = _integer("published_split", "num_tokens", num_tokens, PUBLISHED_MIN_TOKENS)
    padded = _padded(num_tokens)
    split = padded // 2 + offset
    if not 0 < split < num_tokens:
        raise ValueError(
            f"published_split: offset must keep the split inside the batch of {num_tokens} tokens, "
            f"got {offset}: split at {split}"
        )
    return padded, split, padded - split, num_tokens - split


# --------------------------------------------------------------------------------------------------------- the planner


def plan_token_split(
    num_tokens: int,
    context: int,
    model_shape: ModelShape,
    world_size: int,
    hardware: HardwareProfile,
    *,
    requests: Sequence[tuple[int, int]] | None = None,
    launch: str = "graph",
    overrides: Mapping[int, SplitOverride] | None = None,
) -> SplitPlan:
    """The way to run a batch that is predicted to be the fastest; of equally fast ones the simplest.

    Args:
        num_tokens: rows of the batch.
        context: tokens in the KV cache before the first of them. The batch is then one request.
        requests: for a batch of several, ``(query_len, kv_len)`` of each in order, kv_len counting the new tokens;
            ``context`` must be 0. The first half is the first rows of their concatenation.
        launch: "graph" (a replayed CUDA graph) or "eager": what the host costs.
        overrides: see :func:`load_overrides`. The entry nearest to ``num_tokens`` decides; batches of fewer than 1024
            tokens are then never split, as in the published rule. Where that entry's split would leave a larger batch,
            the planner chooses as if there were no table: no batch of a running server fails because of one.

    Raises ValueError for arguments that describe no batch, or ranks that cannot share the model.
    """
    if launch not in LAUNCHES:
        raise ValueError(f"plan_token_split: launch must be one of {', '.join(LAUNCHES)}, got {launch!r}")
    num_tokens, requests = _check_batch("plan_token_split", num_tokens, context, requests)
    cost = CostModel(model_shape, model_shape.check_world_size(world_size), hardware)
    num_layers, exposed_ctas = model_shape.num_layers, hardware.link.exposed(num_tokens)

    whole, _ = attention_halves(requests, np.float64(num_tokens), hardware.attention_tile_rows)
    rows, all_sms = np.float64(num_tokens), np.float64(hardware.num_sms)
    attention, mlp = cost.attention_block(rows, whole, all_sms), cost.mlp_block(rows, all_sms)
    tensor_us = float(num_layers * (attention.tensor_us + mlp.tensor_us))
    other_us = float(num_layers * (attention.other_us + mlp.other_us)) + cost.ends_us()
    norm_us, collective_us = float(cost.norm_us(rows)), float(cost.collective_us(rows, exposed_ctas))
    norms = 2 * num_layers + 1  # two a layer, and the one before the first layer
    device_us = {
        "reference": (tensor_us, other_us + norms * (collective_us + norm_us)),
        "fused": (tensor_us, other_us + norms * (collective_us if world_size > 1 else norm_us)),
        "no_communication": (tensor_us, other_us + norms * norm_us),
    }
    override = _override_for(num_tokens, overrides)
    choice = _best_split(cost, requests, num_tokens, override) if world_size > 1 else None
    predicted_us = {mode: cost.at_power_limit_us(*parts_us) for mode, parts_us in device_us.items()}
    if choice is not None:
        predicted_us["weave"] = choice.layers_us + cost.ends_us()  # both lanes busy: the sustained clock
    calls = attention_calls(requests)
    predicted_us = {mode: max(us, cost.host_us(mode, launch, calls)) for mode, us in predicted_us.items()}

    kind, best_us = "none", predicted_us["reference"]
    if world_size > 1 and predicted_us["fused"] < best_us:
        kind, best_us = "fuse", predicted_us["fused"]
    if choice is not None and (override is not None or predicted_us["weave"] < best_us):
        kind = "split"
    where = (choice.split, choice.attention_ctas, choice.mlp_ctas) if kind == "split" else (0, 0, 0)
    return SplitPlan(num_tokens, kind, *where, exposed_ctas, launch, predicted_us)


def _override_for(num_tokens: int, overrides: Mapping[int, SplitOverride] | None) -> SplitOverride | None:
    """The nearest entry, of two as near that of fewer tokens; None if its split would leave the batch."""
    if not overrides:
        return None
    override = overrides[min(sorted(overrides), key=lambda key: abs(key - num_tokens))]
    fits = _padded(num_tokens) // 2 + override.offset < num_tokens
    return override if fits or num_tokens < PUBLISHED_MIN_TOKENS else None


def _check_batch(
    op: str, num_tokens: int, context: int, requests: Sequence[tuple[int, int]] | None
) -> tuple[int, np.ndarray]:
    """Returns num_tokens, and (query_len, kv_len) of all requests."""
    num_tokens, context = _integer(op, "num_tokens", num_tokens, 1), _integer(op, "context", context, 0)
    if requests is None:
        return num_tokens, np.array([(num_tokens, context + num_tokens)], dtype=np.float64)
    if context:
        raise ValueError(f"{op}: context must be 0 where requests are given, got {context}")
    checked = []
    for index, (query_len, kv_len) in enumerate(requests):
        if not (type(query_len) is type(kv_len) is int and 0 < query_len <= kv_len):
            query_len = _integer(op, f"requests[{index}]: query_len", query_len, 1)
            kv_len = _integer(op, f"requests[{index}]: kv_len", kv_len, query_len)
        checked.append((query_len, kv_len))
    total = sum(query_len for query_len, _ in checked)
    if total != num_tokens:
        raise ValueError(f"{op}: requests must have num_tokens={num_tokens} queries together, got {total}")
    return num_tokens, np.array(checked, dtype=np.float64)


def _candidates(num_tokens: int, step: int) -> np.ndarray:
    low, high = MIN_HALF * num_tokens, (1 - MIN_HALF) * num_tokens
    # Doubling keeps large batches on multiples of large tiles.
    while high - low > MAX_CANDIDATES * step:
        step *= 2
    return np.arange(-(-low // step), high // step + 1) * step


def _most_even(splits: np.ndarray, total_us: np.ndarray, num_tokens: int) -> int:
    """Index of the most even of the best splits: it depends least on what the model does not know."""
    as_good = total_us <= (1 + AS_GOOD) * total_us.min()
    return int(np.where(as_good, np.abs(splits - num_tokens / 2), np.inf).argmin())


def plan_gemm_split(
    num_tokens: int, gemms: Sequence[tuple[int, int]], hardware: HardwareProfile, *, element_bytes: int = 2
) -> int | None:
    """Where to split the rows of some GEMMs that run one after the other so that both halves together take the least.

    The part of :func:`plan_token_split` that waves decide, alone: the same candidates, times and choice among equals.

    Args:
        num_tokens: rows.
        gemms: (features, inner size) of each.

    Returns:
        the rows of the first half; None where both halves cannot be multiples of the profile's ``split_step``.

    Raises ValueError without rows, or without GEMMs.
    """
    num_tokens = _integer("plan_gemm_split", "num_tokens", num_tokens, 1)
    if not gemms:
        raise ValueError(f"plan_gemm_split: gemms must hold at least one (features, inner size), got {gemms!r}")
    splits = _candidates(num_tokens, hardware.split_step)
    if not splits.size:
        return None
    halves = np.stack((splits, num_tokens - splits))
    total_us = sum(gemm_us(halves, *gemm, hardware, element_bytes=element_bytes).sum(0) for gemm in gemms)
    return int(splits[_most_even(splits, total_us, num_tokens)])


class _Choice(NamedTuple):
    split: int
    attention_ctas: int
    mlp_ctas: int
    layers_us: float  # and collectives, without the ends of the pass


def _best_split(
    cost: CostModel, requests: np.ndarray, num_tokens: int, override: SplitOverride | None
) -> _Choice | None:
    """The fastest split, or the override's; None if the batch cannot be split."""
    if override is None:
        splits = _candidates(num_tokens, cost.hardware.split_step)
        attention_ctas = mlp_ctas = cost.hardware.link.cta_choices
    elif num_tokens < PUBLISHED_MIN_TOKENS:
        return None
    else:
        splits = np.array([published_split(num_tokens, override.offset)[1]])
        attention_ctas, mlp_ctas = (override.attention_ctas,), (override.mlp_ctas,)
    if not splits.size:
        return None
    times = weave_times(cost, requests, num_tokens, splits, attention_ctas, mlp_ctas)
    # Halves one after the other: [CTA choice, split].
    attention = overlap_us(times.attention.total_us, times.attention_beside_us, times.attention_collective_us).sum(0)
    mlp = overlap_us(times.mlp.total_us, times.mlp_beside_us, times.mlp_collective_us).sum(0)
    total_us = cost.shape.num_layers * (attention.min(0) + mlp.min(0)) + times.exposed_us.sum((0, 1))
    best = _most_even(splits, total_us, num_tokens)
    a, m = int(attention[:, best].argmin()), int(mlp[:, best].argmin())
    return _Choice(int(splits[best]), attention_ctas[a], mlp_ctas[m], float(total_us[best]))


# ------------------------------------------------------------------------------------------------------- the schedule


class Pair(NamedTuple):
    """A piece of compute of one half beside a collective of the other; microseconds."""

    compute_us: float  # on all multiprocessors
    beside_us: float  # on those that the collective leaves
    collective_us: float

    @property
    def elapsed_us(self) -> float:
        return float(overlap_us(self.compute_us, self.beside_us, self.collective_us))


class WeavePass(NamedTuple):
    """The pieces of a split pass in the order they run; the four pairs are those of one layer."""

    first_collective_us: float  # half 0 before the first layer
    attention: tuple[Pair, Pair]  # of half 0 and of half 1
    mlp: tuple[Pair, Pair]
    last_collective_us: float  # half 1 after the last layer
    ends_us: float  # outside the layers


def weave_pass(
    plan: SplitPlan,
    context: int,
    model_shape: ModelShape,
    world_size: int,
    hardware: HardwareProfile,
    *,
    requests: Sequence[tuple[int, int]] | None = None,
) -> WeavePass:
    """What the pieces of a split plan are predicted to take, for who wants to draw or replay the schedule."""
    if plan.kind != "split":
        raise ValueError(f"weave_pass: plan must be a split, got kind {plan.kind!r}")
    _, requests = _check_batch("weave_pass", plan.num_tokens, context, requests)
    cost = CostModel(model_shape, model_shape.check_world_size(world_size), hardware)
    times = weave_times(cost, requests, plan.num_tokens, [plan.split], [plan.attention_ctas], [plan.mlp_ctas])

    def pairs(*times_us: np.ndarray) -> tuple[Pair, Pair]:
        first, second = (Pair(*(float(us[half, 0, 0]) for us in times_us)) for half in range(2))
        return first, second

    return WeavePass(
        first_collective_us=float(times.exposed_us[0, 0, 0]),
        attention=pairs(times.attention.total_us, times.attention_beside_us, times.attention_collective_us),
        mlp=pairs(times.mlp.total_us, times.mlp_beside_us, times.mlp_collective_us),
        last_collective_us=float(times.exposed_us[1, 0, 0]),
        ends_us=cost.ends_us(),
    )


# ------------------------------------------------------------------------------------------------------ override files


def load_overrides(path: str | Path) -> dict[int, SplitOverride]:
    """A JSON table ``{"1024": {"offset": 0, "attention_ctas": 4, "mlp_ctas": 2}, ...}``, keyed by tokens of a batch.

    Raises ValueError that names the file, the key and what is wrong.
    """
    name = str(path)
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: is not JSON: {error}") from None
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{name}: must be an object with at least one entry, got {table!r}")
    overrides = {}
    for key, row in table.items():
        if not key.isdecimal() or int(key) < 1:
            raise ValueError(f"{name}: keys must be numbers of tokens, got {key!r}")
        names = [item.name for item in fields(SplitOverride)]
        if not isinstance(row, dict) or row.keys() != set(names):
            raise ValueError(f"{name}: {key}: must have exactly the keys {names}, got {row!r}")
        try:
            overrides[int(key)] = SplitOverride(**row)
        except ValueError as error:
            raise ValueError(f"{name}: {key}: {error}") from None
    return overrides
