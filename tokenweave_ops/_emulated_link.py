"""The link that CPU ranks pretend to have: :class:`EmulatedLink`."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class EmulatedLink:
    """A link of given speed, for ``Workspace(group, ..., device="cpu", link=EmulatedLink(...))``.

    Processes of one host exchange rows through its memory, which leaves nothing to hide behind computation. With an
    emulated link a collective returns no earlier than such a link would have carried its rows, counted from when all
    ranks have come; meanwhile the rank sleeps and uses no processor, like a GPU whose copies are under way. Values are
    not affected. Each rank has one link: calls of a rank on several channels have it one after the other. What is timed
    this way is an emulation and has to be called so.

    Args:
        gigabytes_per_s: what a rank sends per second, and at the same time receives; 1e9 bytes each.
        latency_us: of every call, whatever its size.

    Raises:
        ValueError: a speed that is not positive and finite, or a latency that is negative or not finite.
    """

    gigabytes_per_s: float
    latency_us: float = 0.0

    def __post_init__(self):
        if not (math.isfinite(self.gigabytes_per_s) and self.gigabytes_per_s > 0):
            raise ValueError(f"EmulatedLink: gigabytes_per_s must be positive and finite, got {self.gigabytes_per_s}")
        if not (math.isfinite(self.latency_us) and self.latency_us >= 0):
            raise ValueError(f"EmulatedLink: latency_us must be finite and at least 0, got {self.latency_us}")

    def occupied_us(self, op_bytes: int, world_size: int) -> float:
        """For how long a sum over ranks, with or without a norm, occupies a rank's link.

        ``op_bytes`` is ``num_tokens * hidden * itemsize``. While rows are reduced a rank sends all of them and receives
        one world_size-th, while results are handed out the reverse; both go on at once, so each direction carries
        ``op_bytes * (1 + 1 / world_size)``. One rank alone has no link.
        """
        return self._us(op_bytes * (1 + 1 / world_size), world_size)

    def gather_us(self, op_bytes: int, world_size: int) -> float:
        """For how long :func:`gather_residual_` occupies it: a rank receives ``op_bytes``, its own rows as well."""
        return self._us(op_bytes, world_size)

    def _us(self, link_bytes: float, world_size: int) -> float:
        return 0.0 if world_size == 1 else self.latency_us + link_bytes / (self.gigabytes_per_s * 1e3)

    def __str__(self) -> str:
        return f"emulated link of {self.gigabytes_per_s:g} GB/s, {self.latency_us:g} us"
