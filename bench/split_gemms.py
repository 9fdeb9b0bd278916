"""What splitting the tokens costs the GEMMs of an MLP: every split that could pay, beside the whole batch.

The call under test is one rank's MLP: x[T, hidden] times the gate and up weights, SiLU(gate) * up, times the down
weight. Split at S it runs rows [0, S) through all of it, then rows [S, T): both halves in one call, so in one CUDA
graph. Halves of fewer rows fill the multiprocessors' last wave less well; what that costs is the split tax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bench import environment, timing
from bench.harness import max_error
from bench.machines import Buffer, Limit, Tensors, allocate, rotation_sets
from tokenweave_ops import H100, HardwareProfile, cpu_profile, gemm_us, plan_gemm_split, published_split

STEP = 64  # the exhaustive search's; also the published one's
# As the planner has it.
MIN_HALF_PCT = 37

PUBLISHED_OFFSETS = (0, 64, 128, 192, 256)
CHECKED_ROWS = 32  # evenly spaced; the rows on both sides of every split are added
UNSPLIT = 0


@dataclass(frozen=True)
class MlpSizes:
    """One rank's MLP: ``intermediate`` is what the rank holds of it."""

    hidden: int
    intermediate: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def gemms(self) -> tuple[tuple[int, int], ...]:
        """(features, inner) of each."""
        return (2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)

    @property
    def tolerance(self) -> float:
        """Of :func:`harness.max_error`. Results are of the order of 1; three roundings before the sum over
        ``intermediate`` and one after it add up to well under 4 eps in bf16, fp32's sums of thousands to 1024 eps."""
        return (4 if self.dtype == torch.bfloat16 else 1024) * torch.finfo(self.dtype).eps


# TokenWeave's figure of the split cost: Llama-3.3-70B over 8 ranks.
PUBLISHED_SIZES = MlpSizes(hidden=8192, intermediate=3584)
PUBLISHED_TOKENS = tuple(range(1024, 3841, 256))


# --- which splits -----------------------------------------------------------------------------------------------------


def searched_splits(num_tokens: int, step: int = STEP) -> list[int]:
    """Every multiple of `step` that leaves at least 37 % of the tokens to either half."""
    least = MIN_HALF_PCT * num_tokens
    return [split for split in range(step, num_tokens, step) if 100 * min(split, num_tokens - split) >= least]


def published_splits(num_tokens: int) -> dict[int, int]:
    """The split of each published offset; none for sizes that the published rule pads or does not split."""
    if num_tokens < PUBLISHED_TOKENS[0] or num_tokens % 256:
        return {}
    return {offset: published_split(num_tokens, offset)[1] for offset in PUBLISHED_OFFSETS}


def predicted_us(num_tokens: int, splits: Sequence[int], sizes: MlpSizes, hardware: HardwareProfile) -> np.ndarray:
    """The planner's model of the GEMMs of both halves, for each split; without the activation, which is no GEMM."""
    split, bytes_each = np.asarray(splits, dtype=np.float64), sizes.dtype.itemsize
    halves = [split, num_tokens - split]
    model = partial(gemm_us, hardware=hardware, element_bytes=bytes_each)
    return sum(
        np.where(rows > 0, model(rows, features, inner), 0.0) for rows in halves for features, inner in sizes.gemms
    )


def planned_split(num_tokens: int, sizes: MlpSizes, hardware: HardwareProfile) -> int | None:
    """The planner's, asked about these GEMMs alone. None: no candidate."""
    return plan_gemm_split(num_tokens, sizes.gemms, hardware, element_bytes=sizes.dtype.itemsize)


def hardware_profile(device: str, path: Path | None) -> HardwareProfile:
    """What the planner is asked with: the user's profile, or the built-in one under this device's name.

    Raises ValueError for a file that is no profile, or one of another device."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name, num_sms = properties.name, properties.multi_processor_count
    else:
        num_sms = torch.get_num_threads()
        name = f"{environment.cpu_model()}, {num_sms} thread{'s' * (num_sms > 1)}"
    if path is not None:
        profile = HardwareProfile.load(path)
        profile.check_device(name)
        return profile
    if device == "cuda":
        return H100 if name == H100.device else replace(H100, device=name, num_sms=num_sms)
    # Orders of magnitude: the sizes of tiles, not the rates, decide where a split is best.
    return cpu_profile(name, num_sms, gemm_tflops=0.1 * num_sms, memory_gb_s=10.0, link_gb_s=1.0, link_latency_us=10.0)


# --- the calls --------------------------------------------------------------------------------------------------------


def fill_normal(scale: float):
    """Normal values whose sums over so many stay of the order of 1."""
    return lambda tensor, generator: tensor.normal_(0, scale, generator=generator)


def mlp_buffers(num_tokens: int, sizes: MlpSizes) -> dict[str, Buffer]:
    """Weights as checkpoints hold them, [features, inner]."""
    hidden, intermediate, dtype = sizes.hidden, sizes.intermediate, sizes.dtype
    return {
        "x": Buffer((num_tokens, hidden), dtype, fill_normal(1.0)),
        "gate_up_weight": Buffer((2 * intermediate, hidden), dtype, fill_normal(1 / math.sqrt(hidden))),
        "down_weight": Buffer((hidden, intermediate), dtype, fill_normal(1 / math.sqrt(intermediate))),
        "gate_up": Buffer((num_tokens, 2 * intermediate), dtype, rotates=False),
        "activation": Buffer((num_tokens, intermediate), dtype, rotates=False),
        "y": Buffer((num_tokens, hidden), dtype, rotates=False),
    }


def mlp_call(buffers: Tensors, splits: Sequence[int]) -> timing.Call:
    """The MLP over the pieces that `splits` cuts the rows into, one piece after the other."""
    edges = [0, *splits, len(buffers["x"])]
    gate_up_weight, down_weight = buffers["gate_up_weight"].t(), buffers["down_weight"].t()
    intermediate = buffers["activation"].shape[1]
    pieces = []
    for begin, end in pairwise(edges):
        x, gate_up, activation, y = (buffers[name][begin:end] for name in ("x", "gate_up", "activation", "y"))
        pieces.append((x, gate_up, gate_up[:, :intermediate], gate_up[:, intermediate:], activation, y))

    def call() -> None:
        for x, gate_up, gate, up, activation, y in pieces:
            torch.mm(x, gate_up_weight, out=gate_up)
            torch.ops.aten.silu.out(gate, out=activation)
            activation.mul_(up)
            torch.mm(activation, down_weight, out=y)

    return call


def mlp_reference(x: torch.Tensor, gate_up_weight: torch.Tensor, down_weight: torch.Tensor) -> torch.Tensor:
    gate, up = (x.double() @ gate_up_weight.double().t()).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ down_weight.double().t()


def checked_rows(num_tokens: int, splits: Sequence[int]) -> list[int]:
    spaced = np.linspace(0, num_tokens - 1, min(CHECKED_ROWS, num_tokens)).round().astype(int).tolist()
    edges = [row for split in splits for row in (split - 1, split)]
    return sorted({*spaced, *edges})


def filled(buffers: dict[str, Buffer], limit: Limit, machine) -> tuple[list[Tensors], bool]:
    """Buffer sets that hold equal values, and whether one rotation of what `limit` names exceeds the caches."""
    sets, is_cold = rotation_sets(buffers, limit, machine)
    tensors = allocate(buffers, sets, machine)
    for name, buffer in buffers.items():
        if buffer.fill is not None:
            first = tensors[0][name]
            buffer.fill(first, torch.Generator(first.device).manual_seed(20))
            for one in tensors[1:]:
                one[name].copy_(first)
    return tensors, is_cold


# --- one size ---------------------------------------------------------------------------------------------------------


def measure_tax(
    num_tokens: int, sizes: MlpSizes, hardware: HardwareProfile, machine, budget_s: float, monitor=None, make=mlp_call
) -> dict:
    """The row of one number of tokens. Every contestant is checked before any is timed; a wrong one leaves the row
    without times. `make` builds the calls; tests replace it by wrong ones."""
    planned, published, searched = (
        planned_split(num_tokens, sizes, hardware), published_splits(num_tokens), searched_splits(num_tokens)
    )  # fmt: skip
    equal = num_tokens // 2
    splits = sorted({equal, *searched, *published.values(), *([planned] if planned else [])})
    buffers, is_cold = filled(
        mlp_buffers(num_tokens, sizes), Limit("none", ("x", "gate_up_weight", "down_weight")), machine
    )
    row = {
        "num_tokens": num_tokens, "ok": False, "cache": "cold" if is_cold else "hot", "max_err": None, "wrong": [],
        "equal": equal, "planned": planned, "searched": searched, "published": list(published.values()),
        "predicted_ratio": None, "us": None, "us_p20": None, "us_p80": None, "ratios": {}, "best": None,
        "planned_over_best": None, "mirror_noise": None, "rounds": 0, "flags": [],
    }  # fmt: skip
    if planned:
        whole_us, planned_us = predicted_us(num_tokens, [num_tokens, planned], sizes, hardware)
        row["predicted_ratio"] = float(planned_us / whole_us)
    errors = _errors(buffers[0], [UNSPLIT, *splits], machine, make)
    row["wrong"] = [split for split, error in errors.items() if not error <= sizes.tolerance]
    largest = max(errors.values())
    row["max_err"] = largest if math.isfinite(largest) else None
    if row["wrong"]:
        return row
    rotation = timing.Rotation(len(buffers))
    samplers = {
        split: machine.sampler([make(one, [split] if split else []) for one in buffers], rotation) for split in errors
    }
    throttle: set[str] = set()
    watch = (lambda: throttle.update(monitor.throttle_reasons())) if monitor else None
    for sampler in samplers.values():
        sampler.warm_up()
    samples = timing.interleave(samplers, budget_s, clock=machine.clock, after_round=watch)
    row["flags"] = [f"throttled: {reason}" for reason in sorted(throttle)]
    row["flags"] += sorted({s.note for s in samplers.values() if getattr(s, "note", None)})
    return row | _statistics(row, samples)


def _errors(buffers: Tensors, splits: Sequence[int], machine, make) -> dict[int, float]:
    """The largest error of each contestant on sampled rows, its outputs poisoned by NaN before it runs."""
    sample = torch.tensor(checked_rows(len(buffers["x"]), splits[1:]), device=buffers["x"].device)
    expected = mlp_reference(buffers["x"][sample], buffers["gate_up_weight"], buffers["down_weight"])
    errors = {}
    for split in splits:
        for name in ("gate_up", "activation", "y"):
            buffers[name].fill_(math.nan)
        make(buffers, [split] if split else [])()
        machine.synchronize()
        errors[split] = max_error(buffers["y"][sample], expected)
    return errors


def _statistics(row: dict, samples: dict[int, list[float]]) -> dict:
    """Medians of the unsplit times; everything else is a median of ratios within a round."""
    whole = timing.summarise(samples[UNSPLIT])
    ratios = {split: timing.median_ratio(samples[split], samples[UNSPLIT]) for split in samples if split != UNSPLIT}
    searched, planned, num_tokens = row["searched"], row["planned"], row["num_tokens"]
    best = min(searched, key=ratios.get) if searched else None
    # A split and its mirror image run the same GEMMs: what they differ by is what a ratio here is worth.
    mirrored = [
        abs(ratios[s] / ratios[num_tokens - s] - 1) for s in searched if 2 * s < num_tokens and num_tokens - s in ratios
    ]
    return {
        "ok": True, "us": whole.us, "us_p20": whole.us_p20, "us_p80": whole.us_p80,
        "ratios": {str(split): ratio for split, ratio in ratios.items()}, "best": best,
        "planned_over_best": ratios[planned] / ratios[best] if planned and best else None,
        "mirror_noise": median(mirrored) if mirrored else None, "rounds": len(samples[UNSPLIT]),
        "flags": row["flags"] + (["noisy"] if whole.us_p80 > 1.5 * whole.us_p20 else []),
    }  # fmt: skip
