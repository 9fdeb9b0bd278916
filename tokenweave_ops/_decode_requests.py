"""What a batch of sequences under decoding asks for: the selection policy of each and its numbers, on the device.

Nothing here is read by the host while decoding runs, so requests with different policies share a batch, and a CUDA
graph that was captured once follows every later change of these tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

# The number a policy has in `DecodeRequests.policy` is its place here.
POLICIES = (
    "topk",
    "threshold",
    "factor",
    "local_leap",
    "eb",
    "entropy_threshold",
    "margin",
    "klass",
    "topk_margin",
    "topk_entropy",
)

# The number of a feature in the ops' `features` argument is 1 << its place here.
FEATURES = ("entropy", "margin", "sampling", "divergence")

# Published defaults (see anchor_decoding's policy table); a policy that is not named has no use for the number.
DEFAULT_THRESHOLD = {
    "threshold": 0.9,
    "factor": 1.0,
    "local_leap": 0.9,
    "eb": 0.001,
    "entropy_threshold": 0.45,
    "margin": 0.9,
    "klass": 0.6,
}
DEFAULT_RELAXED_THRESHOLD = {"local_leap": 0.75, "klass": 0.01}
DEFAULT_RADIUS = 4

_FEATURES_OF_POLICY = {
    "eb": {"entropy"},
    "entropy_threshold": {"entropy"},
    "topk_entropy": {"entropy"},
    "margin": {"margin"},
    "topk_margin": {"margin"},
    "klass": {"divergence"},
}

PerRequest = float | int | Sequence[float] | Sequence[int] | Tensor


def policy_number(name: str) -> int:
    """The number of a policy; the error lists the known ones."""
    if name not in POLICIES:
        raise ValueError(f"DecodeRequests: policy must be one of {', '.join(POLICIES)}, got {name!r}")
    return POLICIES.index(name)


def feature_mask(features: Iterable[str]) -> int:
    """The `features` argument of the ops."""
    mask = 0
    for name in features:
        if name not in FEATURES:
            raise ValueError(f"DecodeRequests: features must be of {', '.join(FEATURES)}, got {name!r}")
        mask |= 1 << FEATURES.index(name)
    return mask


def _per_request(name: str, value: PerRequest, batch: int, dtype: torch.dtype, device) -> Tensor:
    if isinstance(value, (int, float)):
        if dtype == torch.int64 and int(value) != value:
            raise ValueError(f"DecodeRequests: {name} must be a whole number, got {value}")
        return torch.full((batch,), value, dtype=dtype, device=device)  # a kernel; a copy would wait for the device
    tensor = torch.as_tensor(value, device=device)
    if dtype == torch.int64 and tensor.is_floating_point() and tensor.numel() > 0:
        raise ValueError(f"DecodeRequests: {name} must be whole numbers, got {tensor.dtype}")
    tensor = tensor.to(dtype)
    if tensor.dim() > 1 or (tensor.dim() == 1 and tensor.numel() != batch):
        raise ValueError(f"DecodeRequests: {name} must be a number or {batch} of them, got shape {list(tensor.shape)}")
    return tensor.expand(batch).clone()


@dataclass
class DecodeRequests:
    """Parameters and state of a batch, contiguous tensors ``[batch]`` on one device unless another shape is given.

    Parameters, read by the ops and free to be overwritten between steps:

    Attributes:
        block_start: int64, the first position of the sequence's current block.
        policy: int64, an index into :data:`POLICIES`.
        threshold: fp32, the policy's first number: kappa, theta, f, gamma or h (the table in `anchor_decoding`).
        relaxed_threshold: fp32, tau of local_leap; epsilon, in nats, of klass.
        radius: int64, W of local_leap, at least 0.
        temperature: fp32, 0 to 1e30; 0 takes the most probable token, T > 0 samples softmax(logits / T).
        seed: int64, of the noise; the same seed, step and place in the block give the same noise in any batch.

    State, written by the step; :meth:`begin_block_` resets what belongs to a block:

    Attributes:
        step: int64, counts the steps in which a sequence had candidates: the noise of each step is new.
        steps_left: int64, at least 1: over how many steps topk and klass spread the block's masks, this one included.
        stable_steps: int64 ``[batch, block_length]``, for klass: how many steps in a row the position's distribution
            has hardly changed; -1 where it has no distribution of a step before.
        tickets: int32 ``[batch, block_length + 1]``, zeros between calls: who of a GPU's blocks comes last. So the same
            requests serve one call at a time, and have to be made anew after a launch that died.

    ``features`` (names of :data:`FEATURES`) says which statistics the rows need beside the confidence.
    """

    block_start: Tensor
    policy: Tensor
    threshold: Tensor
    relaxed_threshold: Tensor
    radius: Tensor
    temperature: Tensor
    seed: Tensor
    step: Tensor
    steps_left: Tensor
    stable_steps: Tensor
    tickets: Tensor
    features: frozenset[str] = frozenset()

    @classmethod
    def make(
        cls,
        batch: int,
        block_length: int,
        *,
        policy: str | Sequence[str] = "local_leap",
        threshold: PerRequest | None = None,
        relaxed_threshold: PerRequest | None = None,
        radius: PerRequest = DEFAULT_RADIUS,
        temperature: PerRequest = 0.0,
        seed: PerRequest = 0,
        block_start: PerRequest = 0,
        steps: PerRequest | None = None,
        features: Iterable[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> DecodeRequests:
        """Requests from numbers, or from one number per request; None takes the policy's published default.

        ``steps`` (default: block_length) is over how many steps topk spreads a block. ``features`` defaults to what the
        policies and temperatures given here need; name more of them if you will write other policies in later.

        Raises:
            ValueError: a policy or feature is unknown, or a sequence has not one entry per request.
        """
        if isinstance(policy, str):
            policy_number(policy)  # here, so that an empty batch is checked too
        names = [policy] * batch if isinstance(policy, str) else list(policy)
        if len(names) != batch:
            raise ValueError(f"DecodeRequests: policy must be a name or {batch} of them, got {len(names)}")
        numbers = [policy_number(name) for name in names]
        if threshold is None:
            threshold = [DEFAULT_THRESHOLD.get(name, 0.0) for name in names]
        if relaxed_threshold is None:
            relaxed_threshold = [DEFAULT_RELAXED_THRESHOLD.get(name, 0.0) for name in names]

        def real(name: str, value: PerRequest) -> Tensor:
            return _per_request(name, value, batch, torch.float32, device)

        def integer(name: str, value: PerRequest) -> Tensor:
            return _per_request(name, value, batch, torch.int64, device)

        temperatures = real("temperature", temperature)
        if features is None:
            features = set().union(*(_FEATURES_OF_POLICY.get(name, set()) for name in names))
            if (temperatures > 0).any():
                features.add("sampling")
        chosen = frozenset(features)
        feature_mask(chosen)
        return cls(
            block_start=integer("block_start", block_start),
            policy=torch.tensor(numbers, dtype=torch.int64, device=device),
            threshold=real("threshold", threshold),
            relaxed_threshold=real("relaxed_threshold", relaxed_threshold),
            radius=integer("radius", radius),
            temperature=temperatures,
            seed=integer("seed", seed),
            step=integer("step", 0),
            steps_left=integer("steps", block_length if steps is None else steps),
            stable_steps=torch.full((batch, block_length), -1, dtype=torch.int64, device=device),
            tickets=torch.zeros(batch, block_length + 1, dtype=torch.int32, device=device),
            features=chosen,
        )

    @property
    def feature_mask(self) -> int:
        """`features` as the ops take them."""
        return feature_mask(self.features)

    @property
    def batch(self) -> int:
        return self.stable_steps.shape[0]

    @property
    def block_length(self) -> int:
        return self.stable_steps.shape[1]

    def begin_block_(self, block_start: PerRequest, steps: PerRequest, where: Tensor | None = None) -> None:
        """Moves the sequences on to a new block: its first position, and over how many steps topk spreads it.

        ``where`` (bool ``[batch]``) limits this to some of the sequences. Does not synchronise with the host if the
        arguments are numbers or tensors on the device.
        """
        device = self.block_start.device
        start = _per_request("block_start", block_start, self.batch, torch.int64, device)
        left = _per_request("steps", steps, self.batch, torch.int64, device)
        if where is None:
            self.block_start.copy_(start)
            self.steps_left.copy_(left)
            self.stable_steps.fill_(-1)
        else:
            torch.where(where, start, self.block_start, out=self.block_start)
            torch.where(where, left, self.steps_left, out=self.steps_left)
            self.stable_steps.masked_fill_(where.unsqueeze(1), -1)

    def clone(self) -> DecodeRequests:
        """A copy that shares no memory with this one."""
        return DecodeRequests(**{name: tensor.clone() for name, tensor in self._tensors()}, features=self.features)

    def select(self, which: Tensor) -> DecodeRequests:
        """A copy of some of the requests: int64 indices, or a bool mask ``[batch]`` (which waits for the device)."""
        return DecodeRequests(**{name: tensor[which] for name, tensor in self._tensors()}, features=self.features)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        """All tensors by name; fresh tickets, for these may be those of a launch that died."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "features"}
        return list((found | {"tickets": torch.zeros_like(self.tickets)}).items())
