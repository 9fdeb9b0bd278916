"""What this machine can do, measured: the yardsticks that rows are compared with. No datasheet numbers.

Each is the fastest way we know to move (or multiply) the same bytes in plain torch. Integer views are used because they
keep every bit pattern, and because torch's bf16 arithmetic on a CPU is limited by instructions, not by memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

STREAMS = {
    "rmw": "x.view(int32).bitwise_xor_(0) on each tensor, in place",
    "copy": "out.copy_(x) into preallocated outputs",
    "read": "x.view(int32).amax()",
}
FORMULATION = STREAMS | {"matmul": "torch.mm(a, b, out=c) of fp32 matrices, the rate of multiply-adds"}
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.view(-1)
    size = flat.numel() * flat.element_size()
    return flat.view(torch.int32 if size % 4 == 0 else torch.int16 if size % 2 == 0 else torch.int8)


def stream_call(kind: str, tensors: list[torch.Tensor]) -> tuple[Callable[[], object], int]:
    """A call that streams the tensors, and the bytes it moves. For `copy`: sources, then as many destinations."""
    flat = [_as_integers(tensor) for tensor in tensors]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if kind == "rmw":
        steps = [partial(tensor.bitwise_xor_, 0) for tensor in flat]
        size *= 2
    elif kind == "copy":
        half = len(flat) // 2
        if half * 2 != len(flat):
            raise ValueError("a copy needs as many destinations as sources")
        steps = [partial(target.copy_, source) for source, target in zip(flat[:half], flat[half:], strict=True)]
    elif kind == "read":
        steps = [partial(torch.amax, tensor) for tensor in flat]
    else:
        raise ValueError(f"unknown limit {kind!r} of bytes; known: {', '.join(STREAMS)}")
    if len(steps) == 1:
        return steps[0], size

    def call() -> None:
        for step in steps:
            step()

    return call, size


def matmul_call(device: str, dtype: torch.dtype, size: int | None = None) -> tuple[Callable[[], object], int]:
    """A square matmul into a preallocated output, and its floating-point operations. By default one large enough to
    show the rate of the device; fp32 is fp32 inside too, unless torch was told otherwise."""
    size = size or MATMUL_SIZE[device]
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    return partial(torch.mm, a, b, out=torch.empty_like(a)), 2 * size**3
