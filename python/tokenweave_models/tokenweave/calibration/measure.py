"""What `tokenweave calibrate` measures: rates and overheads of this process's device, fitted to the planner's formulas.

Every measurement gives fields of a :class:`HardwareProfile` and how far the planner's formula is from the times it was
fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from time import perf_counter

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import tokenweave_ops
from tokenweave_models.common.stopwatch import Stopwatch
from tokenweave_ops import EmulatedLink, HardwareProfile, LinkModel, ModelShape, Workspace, gemm_us

MIN_BATCHES = 5
MAX_FACTOR = 1e4  # of a fitted value over its first guess
GRAPH_KERNELS = 200


@dataclass(frozen=True)
class Effort:
    """How long one time may be measured, and over which sizes."""

    seconds: float  # per size
    gemms: tuple[tuple[int, int], ...]  # (features, inner)
    gemm_rows: tuple[int, ...]
    rows: tuple[int, ...]  # of norms and collectives
    hidden: int  # of those
    heads: int
    head_dim: int
    queries: tuple[int, ...]  # of attention
    stream_bytes: int  # larger than the caches
    ctas: tuple[int, ...]


def gemms_of(shape: ModelShape, world_size: int) -> tuple[tuple[int, int], ...]:
    """(features, inner) of a layer's projections on one rank: QKV, output, gate and up, down."""
    q_features = shape.num_heads * shape.head_dim // world_size
    kv_features = 2 * max(1, shape.num_kv_heads // world_size) * shape.head_dim
    inner = shape.intermediate // world_size
    return (
        (q_features + kv_features, shape.hidden),
        (shape.hidden, q_features),
        (2 * inner, shape.hidden),
        (shape.hidden, inner),
    )


def effort_for(device: torch.device, shape: ModelShape, world_size: int, quick: bool) -> Effort:
    """The sizes of a rank of this model, in batches that the device is used for."""
    sizes = {
        "gemms": gemms_of(shape, world_size),
        "hidden": shape.hidden,
        "head_dim": shape.head_dim,
    }
    if device.type == "cuda":
        # Close together where waves of tiles make steps: the planner goes from one to the next in a straight line.
        full = Effort(
            **sizes, seconds=0.05, gemm_rows=(*range(64, 4096, 64), *range(4096, 8193, 512)),
            rows=(256, 512, 1024, 2048, 4096, 8192), heads=64, queries=(1024, 2048, 4096, 8192),
            stream_bytes=1 << 30, ctas=(2, 4, 8, 16, 32),
        )  # fmt: skip
    else:
        full = Effort(
            **sizes, seconds=0.25, gemm_rows=(16, 32, 48, 64, 96, 128, 192, 256, 384, 512), rows=(64, 128, 256, 512),
            heads=8, queries=(128, 256, 512), stream_bytes=128 << 20, ctas=(1,),
        )  # fmt: skip
    if not quick:
        return full
    return replace(
        full, seconds=full.seconds / 4, gemm_rows=full.gemm_rows[3::4], rows=full.rows[1::2], queries=full.queries[-2:]
    )


@dataclass(frozen=True)
class Measurement:
    values: dict[str, float]  # of the profile's fields
    error: float | None = None  # mean |predicted / measured - 1| over the times it was fitted to
    num_times: int = 1
    gemm_samples: tuple[tuple[int, int, int, float], ...] = ()  # of GEMMs: the times themselves, as a profile has them

    @property
    def fields(self) -> dict:
        """For :meth:`HardwareProfile.with_measured`."""
        return self.values | ({"gemm_samples": self.gemm_samples} if self.gemm_samples else {})


def call_us(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Time of a call in the fastest of many batches: whatever disturbs a measurement only adds to it."""
    call()
    once = Stopwatch(device)
    with once.measure():
        call()
    batch = max(1, round(1.0 / max(once.total_ms(), 1e-3)))  # of about a millisecond
    stopwatch, batches, end_s = Stopwatch(device), 0, perf_counter() + seconds
    while batches < MIN_BATCHES or perf_counter() < end_s:
        with stopwatch.measure():
            for _ in range(batch):
                call()
        batches += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return min(stopwatch.each_ms()) * 1e3 / batch


def minimise(error: Callable[[list[float]], float], start: Sequence[float]) -> list[float]:
    """Positive parameters, within a factor of MAX_FACTOR of ``start``, with the least error: tries a step of each up
    and down, and halves the steps where none helps. Needs no gradient: waves of tiles make jumps."""
    best, least, step = list(start), error(list(start)), 1.0
    while step > 1e-4:
        improved = False
        for index in range(len(best)):
            for factor in (1 + step, 1 / (1 + step)):
                tried = [*best]
                tried[index] *= factor
                if not 1 / MAX_FACTOR <= tried[index] / start[index] <= MAX_FACTOR:
                    continue
                if (found := error(tried)) < least:
                    best, least, improved = tried, found, True
        if not improved:
            step /= 2
    return best


def fit(
    names: Sequence[str], start: Sequence[float], predicted_us: Callable[..., list[float]], measured_us: list[float]
) -> Measurement:
    """The positive parameters for which predicted_us(*parameters) is nearest to the measured times, by ratio."""

    def error(parameters: Sequence[float]) -> float:
        pairs = zip(predicted_us(*parameters), measured_us, strict=True)
        return sum(math.log(predicted / measured) ** 2 for predicted, measured in pairs)

    best = minimise(error, start)
    pairs = zip(predicted_us(*best), measured_us, strict=True)
    error_of_best = mean(abs(predicted / measured - 1) for predicted, measured in pairs)
    return Measurement(dict(zip(names, best, strict=True)), error_of_best, len(measured_us))


# -------------------------------------------------------------------------------------------------------- one device


def measure_launch(profile: HardwareProfile, device: torch.device, dtype: torch.dtype, effort: Effort) -> Measurement:
    """The shortest kernel, and what the host needs per operation of a layer: both with one row of 64 features."""
    hidden, heads = 64, 1
    x, weight = torch.randn(1, hidden, device=device).to(dtype), torch.randn(hidden, hidden, device=device).to(dtype)
    cache, cosine = torch.zeros(8, hidden, device=device, dtype=dtype), torch.ones(hidden, device=device, dtype=dtype)

    def layer() -> None:  # the eight operations that the planner counts
        q = F.linear(x, weight)
        q = q * cosine
        cache[0] = q[0]
        q = q.view(1, heads, 1, hidden)
        F.scaled_dot_product_attention(q, q, q)
        F.linear(F.silu(F.linear(F.linear(x, weight), weight)), weight)

    def host_us(call: Callable[[], None], num_ops: int) -> float:
        times = []
        call()
        end_s = perf_counter() + effort.seconds
        while len(times) < MIN_BATCHES or perf_counter() < end_s:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin_s = perf_counter()
            call()
            times.append(perf_counter() - begin_s)
        return min(times) * 1e6 / num_ops

    eager_us = host_us(layer, 8)
    if device.type == "cpu":
        kernel_us = call_us(lambda: torch.add(x, 1.0, out=x), device, effort.seconds)
        return Measurement({"kernel_us": kernel_us, "eager_launch_us": eager_us}, num_times=2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_KERNELS):
            x.add_(0.0)
    kernel_us = call_us(graph.replay, device, effort.seconds) / GRAPH_KERNELS
    graph_us = host_us(graph.replay, GRAPH_KERNELS)
    values = {"kernel_us": kernel_us, "eager_launch_us": eager_us, "graph_launch_us": graph_us}
    return Measurement(values, num_times=3)


def measure_memory(profile: HardwareProfile, device: torch.device, dtype: torch.dtype, effort: Effort) -> Measurement:
    """A copy of more than the caches hold."""
    source = torch.zeros(effort.stream_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    us = call_us(lambda: target.copy_(source), device, effort.seconds)
    return Measurement({"hbm_gb_s": 2 * effort.stream_bytes / us / 1e3})


def measure_norm(profile: HardwareProfile, device: torch.device, dtype: torch.dtype, effort: Effort) -> Measurement:
    """Residual add and norm at the sizes of a batch's activations."""
    weight = torch.ones(effort.hidden, device=device, dtype=dtype)
    measured_us, moved_bytes = [], []
    for rows in effort.rows[-2:]:
        x, residual = (torch.ones(rows, effort.hidden, device=device, dtype=dtype) for _ in range(2))
        # The residual grows from call to call, which takes no longer.
        us = call_us(lambda x=x, r=residual: tokenweave_ops.add_rms_norm_(x, r, weight), device, effort.seconds)
        measured_us.append(us)
        moved_bytes.append(4 * x.nbytes)

    def predicted_us(gb_s: float) -> list[float]:
        return [num_bytes / (gb_s * 1e3) + profile.kernel_us for num_bytes in moved_bytes]

    return fit(["norm_gb_s"], [profile.norm_gb_s], predicted_us, measured_us)


def measure_gemm(profile: HardwareProfile, device: torch.device, dtype: torch.dtype, effort: Effort) -> Measurement:
    """Projections of a layer over rows, which the profile keeps; for all other shapes their rate and, where there are
    several tiles, what small ones and waves cost."""
    samples = []
    for features, inner in dict.fromkeys(effort.gemms):
        weight = torch.randn(features, inner, device=device).to(dtype)
        for rows in effort.gemm_rows:
            x = torch.randn(rows, inner, device=device).to(dtype)
            us = call_us(lambda x=x, weight=weight: F.linear(x, weight), device, effort.seconds)
            samples.append((features, inner, rows, us))

    names = ["gemm_tflops"] + (["gemm_operand_rows", "gemm_wave_us"] if len(profile.gemm_tiles) > 1 else [])
    rows = np.array(effort.gemm_rows)

    def predicted_us(*values: float) -> list[float]:
        tried = replace(profile, gemm_samples=(), **dict(zip(names, values, strict=True)))
        return [
            us
            for features, inner in dict.fromkeys(effort.gemms)
            for us in gemm_us(rows, features, inner, tried, element_bytes=dtype.itemsize).tolist()
        ]

    start = [max(getattr(profile, name), 1e-3) for name in names]
    return replace(fit(names, start, predicted_us, [us for *_, us in samples]), gemm_samples=tuple(samples))


def measure_attention(
    profile: HardwareProfile, device: torch.device, dtype: torch.dtype, effort: Effort
) -> Measurement:
    """Causal attention of one request without a cache."""
    measured_us = []
    for queries in effort.queries:
        q, k, v = (torch.randn(1, effort.heads, queries, effort.head_dim, device=device).to(dtype) for _ in range(3))
        measured_us.append(
            call_us(
                lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True), device, effort.seconds
            )
        )

    def predicted_us(tflops: float, extra_keys: float) -> list[float]:
        flops = [
            4 * effort.head_dim * effort.heads * (queries * (queries + 1) / 2 + extra_keys * queries)
            for queries in effort.queries
        ]
        return [number / (tflops * 1e6) + profile.kernel_us for number in flops]

    start = [profile.attention_tflops, max(profile.attention_extra_keys, 1.0)]
    return fit(["attention_tflops", "attention_extra_keys"], start, predicted_us, measured_us)


STEPS = {
    "host launch": measure_launch,
    "memory": measure_memory,
    "residual add and norm": measure_norm,
    "GEMM": measure_gemm,
    "attention": measure_attention,
}


def measure_device(
    profile: HardwareProfile, device: torch.device, dtype: torch.dtype, effort: Effort
) -> Iterator[tuple[str, Measurement]]:
    """Step by step; each uses what the earlier ones have found."""
    for name, step in STEPS.items():
        with torch.inference_mode():
            found = step(profile, device, dtype, effort)
        profile = profile.with_measured(**found.fields)
        yield name, found


# ------------------------------------------------------------------------------------------------------ between ranks


def time_collectives(
    group, device: torch.device, dtype: torch.dtype, effort: Effort, link: EmulatedLink | None
) -> list[tuple[int, int, float]]:
    """(bytes, CTAs, microseconds) of the fused all-reduce, residual add and norm; on the slowest rank."""
    rows, times = (1, *effort.rows), []
    with (
        Workspace(group, max(rows), effort.hidden, dtype, device=device, link=link) as workspace,
        torch.inference_mode(),
    ):
        weight = torch.ones(effort.hidden, device=device, dtype=dtype)
        for num_tokens in rows:
            x, residual = (
                workspace.empty(num_tokens),
                torch.zeros(num_tokens, effort.hidden, device=device, dtype=dtype),
            )
            x.zero_()
            for ctas in effort.ctas:
                us = _collective_us(group, device, effort.seconds, workspace, (x, residual, weight), ctas)
                times.append((x.nbytes, ctas, us))
        workspace.check()
    return times


def _collective_us(group, device: torch.device, seconds: float, workspace: Workspace, tensors, ctas: int) -> float:
    """The number of calls is the same on all ranks: it follows from the slowest one's first."""
    options = {"max_ctas": ctas} if device.type == "cuda" else {}

    def timed(calls: int) -> float:
        dist.barrier(group)
        stopwatch = Stopwatch(device)
        with stopwatch.measure():
            for _ in range(calls):
                tokenweave_ops.allreduce_rmsnorm_(*tensors, workspace, **options)
        slowest = torch.tensor(stopwatch.total_ms() * 1e3 / calls)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group)
        return slowest.item()

    timed(2)
    once_us = timed(2)
    calls = max(1, min(200, round(1000.0 / once_us)))
    batches = max(MIN_BATCHES, min(50, int(seconds * 1e6 / (calls * once_us))))
    return min(timed(calls) for _ in range(batches))


def fit_link(profile: HardwareProfile, world_size: int, times: Sequence[tuple[int, int, float]]) -> Measurement:
    names = ["link_gb_s", "latency_us"]
    start = [profile.link.link_gb_s, max(profile.link.latency_us, 1.0)]
    if len({ctas for _, ctas, _ in times}) > 1:
        names += ["cta_gb_s", "stream_gb_s"]
        start += [min(profile.link.cta_gb_s, 100.0), min(profile.link.stream_gb_s, 1000.0)]

    def predicted_us(*values: float) -> list[float]:
        link: LinkModel = replace(profile.link, **dict(zip(names, values, strict=True)))
        return [float(link.collective_us(num_bytes, world_size, ctas)) for num_bytes, ctas, _ in times]

    return fit(names, start, predicted_us, [us for _, _, us in times])
