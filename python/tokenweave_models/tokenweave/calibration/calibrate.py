"""`tokenweave calibrate`: measures the device at hand, so that the planner need not assume it.

Ranks of a CPU share it, so they are measured as they will run: all at the same time, each on its threads. A GPU is
measured alone; the link between GPUs if there are several. What was not measured keeps a built-in value and is said to.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from tokenweave_models.common.arguments import positive
from tokenweave_models.common.console import console, print_table, progress
from tokenweave_models.common.errors import UserError
from tokenweave_models.common.ranks import run_ranks, usable_cores
from tokenweave_models.tokenweave.calibration import measure, profiles
from tokenweave_models.tokenweave.calibration.measure import Effort, Measurement
from tokenweave_models.tokenweave.calibration.profiles import LINK_FIELDS
from tokenweave_models.tokenweave.demo import DTYPES, choose_device
from tokenweave_models.tokenweave.simulator.model_shapes import MODEL_SHAPES
from tokenweave_ops import EmulatedLink, HardwareProfile, ModelShape

TIMEOUT_S = 900.0
LINK = "link between ranks"
LARGE_ERROR = 0.25
# On a CPU, where larger models are not run.
SMALL = ModelShape(
    hidden=1024, intermediate=2816, num_layers=4, num_heads=16, num_kv_heads=4, head_dim=64, vocab_size=256
)

UNITS = {
    "gemm_tflops": "TFLOPS",
    "gemm_operand_rows": "rows",
    "gemm_wave_us": "us",
    "attention_tflops": "TFLOPS",
    "attention_extra_keys": "keys",
    "attention_tile_rows": "rows",
    "hbm_gb_s": "GB/s",
    "norm_gb_s": "GB/s",
    "kernel_us": "us",
    "eager_launch_us": "us",
    "moe_launch_us": "us",
    "graph_launch_us": "us",
    "pass_us": "us",
    "link_gb_s": "GB/s",
    "latency_us": "us",
    "cta_gb_s": "GB/s",
    "stream_gb_s": "GB/s",
}
# Why a number is never measured here.
NOT_MEASURED = {
    "gemm_tiles": "the tiles are the library's own business",
    "moe_gemm_efficiency": "no routed experts are timed",
    "moe_launch_us": "no routed experts are timed",
    "attention_tile_rows": "the tile is the library's own business",
    "low_power_share": "needs the power of a whole model's pass",
    "pass_us": "needs a whole model",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="rates are those of this type")
    parser.add_argument("--ranks", type=positive, help="that will share a CPU (default 2), or GPUs (default: all)")
    parser.add_argument(
        "--model",
        choices=tuple(MODEL_SHAPES),
        help="whose sizes are timed (default: llama-3.3-70b on a GPU, small on a CPU)",
    )
    parser.add_argument(
        "--tp", type=positive, help="ranks that share the model (default: 8 on a GPU, --ranks on a CPU)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes, a quarter of the time")
    parser.add_argument(
        "--link-gb-s", type=float, metavar="GB_S", help="CPU: measure between ranks with an emulated link of this speed"
    )
    parser.add_argument("--link-us", type=float, default=0.0, metavar="US", help="and of this latency")
    parser.add_argument("--output", type=Path, default=Path("build/profile.json"), help="where the profile is stored")


# ------------------------------------------------------------------------------------------------------ in every rank


@dataclass(frozen=True)
class Task:
    """What is measured, the same on all ranks."""

    shape: ModelShape
    tp: int  # ranks over which the model is divided
    dtype: torch.dtype
    quick: bool
    link: EmulatedLink | None = None

    def effort(self, device: torch.device) -> Effort:
        return measure.effort_for(device, self.shape, self.tp, self.quick)


def _measure_cpu_rank(group, report: Callable[[str], None], task: Task) -> tuple[str, dict[str, Measurement], list]:
    """The built-in profile of the rank's share, what was found, and times of collectives. Rank 0 reports the steps."""
    device = torch.device("cpu")
    profile, found = profiles.built_in_profile(device), {}
    for name, measurement in measure.measure_device(profile, device, task.dtype, task.effort(device)):
        found[name] = measurement
        if group.rank() == 0:
            report(name)
    return profile.to_json(), found, _time_collectives(group, device, task)


def _measure_gpu_link(group, report: Callable[[str], None], task: Task) -> list:
    device = torch.device("cuda", group.rank())
    torch.cuda.set_device(device)
    return _time_collectives(group, device, task)


def _time_collectives(group, device: torch.device, task: Task) -> list:
    if group.size() == 1:
        return []
    return measure.time_collectives(group, device, task.dtype, task.effort(device), task.link)


def _together(measurements: list[Measurement]) -> Measurement:
    """Of ranks that were measured at the same time: the median, and the worst fit."""
    first = measurements[0]
    errors = [found.error for found in measurements if found.error is not None]
    values = {name: median(found.values[name] for found in measurements) for name in first.values}
    samples = [
        (features, inner, rows, median(found.gemm_samples[index][3] for found in measurements))
        for index, (features, inner, rows, _) in enumerate(first.gemm_samples)
    ]
    return Measurement(values, max(errors, default=None), first.num_times, tuple(samples))


# ----------------------------------------------------------------------------------------------------------- by device


def calibrate(
    device: torch.device, ranks: int, task: Task, on_step: Callable[[str], None]
) -> tuple[HardwareProfile, dict[str, Measurement], str | None]:
    """The profile, what was measured by the name of its step, and why the link was not (None if it was)."""
    why_no_link = "one rank (--ranks 1)" if ranks == 1 else None
    times: list[tuple[int, int, float]] = []
    if device.type == "cpu":
        results = run_ranks(_measure_cpu_rank, ranks, task, timeout_s=TIMEOUT_S, on_report=on_step)
        profile = HardwareProfile.from_json(results[0][0])
        found = {name: _together([of_rank[name] for _, of_rank, _ in results]) for name in measure.STEPS}
        times = results[0][2]
    else:
        profile, found = profiles.built_in_profile(device), {}
        for name, measurement in measure.measure_device(profile, device, task.dtype, task.effort(device)):
            found[name] = measurement
            on_step(name)
        if torch.cuda.device_count() == 1:
            why_no_link = "1 GPU visible"
        elif ranks > 1:
            times = run_ranks(_measure_gpu_link, ranks, task, timeout_s=TIMEOUT_S)[0]
    if times:
        found[LINK] = measure.fit_link(profile, ranks, times)
        if task.link is not None:  # it sleeps
            profile = replace(profile, link=replace(profile.link, sms_per_cta=0))
    on_step(LINK)
    for measurement in found.values():
        profile = profile.with_measured(**measurement.fields)
    dtype_name = next(name for name, value in DTYPES.items() if value == task.dtype)
    profile = replace(
        profile,
        name=f"{ranks} ranks, {dtype_name}" if times else dtype_name,
        sources=_with_reasons(profile, device, why_no_link, task.link),
    )
    return profile, found, why_no_link


def _with_reasons(
    profile: HardwareProfile, device: torch.device, why_no_link: str | None, link: EmulatedLink | None
) -> dict[str, str]:
    """The sources, with a reason wherever a number was not measured."""
    reasons = dict(NOT_MEASURED)
    if device.type == "cpu":
        reasons |= {
            "graph_launch_us": "a CPU has no CUDA graphs",
            "gemm_operand_rows": "one tile, nothing to tell it by",
            "gemm_wave_us": "one tile, nothing to tell it by",
            "cta_gb_s": "a CPU rank has no CTAs",
            "stream_gb_s": "a CPU rank has no CTAs",
        }
    if why_no_link is not None:
        reasons |= dict.fromkeys(LINK_FIELDS, why_no_link)
    sources = profiles.sources_of(profile)
    for name, source in sources.items():
        if source == "measured" and link is not None and name in LINK_FIELDS:
            sources[name] = f"measured: {link}"
        elif not source.startswith("measured"):
            sources[name] = f"{source or 'assumption'}; not measured: {reasons.get(name, 'taken as known')}"
    return sources


# ------------------------------------------------------------------------------------------------------------- output


def print_profile(profile: HardwareProfile, found: dict[str, Measurement]) -> None:
    rows = []
    for name, source in profile.sources.items():
        value = getattr(profile.link if name in LINK_FIELDS else profile, name)
        text = f"{value:.4g}" if isinstance(value, (int, float)) else f"{len(value)} of them" if value else "none"
        measured = source.startswith("measured")
        state = "measured" if measured else "kept"
        why = source.partition("not measured: ")[2] if not measured else source.partition(": ")[2]
        rows.append((name, text, UNITS.get(name, ""), state, why))
    print_table(f"{profile.device}, {profile.name}", ("", "value", "unit", "", "why"), rows)
    print_table(
        "Times that the numbers were fitted to, and how far the planner's formulas are from them",
        ("", "times", "mean error"),
        [
            (name, str(each.num_times), "read directly" if each.error is None else f"{each.error:.1%}")
            for name, each in found.items()
        ],
    )


def emulated_link(arguments: argparse.Namespace, device: torch.device, ranks: int) -> EmulatedLink | None:
    if arguments.link_gb_s is None:
        if arguments.link_us:
            raise UserError("--link-us needs --link-gb-s: both describe the emulated link")
        return None
    if device.type != "cpu" or ranks == 1:
        raise UserError("--link-gb-s: only CPU ranks, two or more, can have an emulated link")
    try:
        return EmulatedLink(arguments.link_gb_s, arguments.link_us)
    except ValueError as error:
        raise UserError(str(error)) from error


def run(arguments: argparse.Namespace) -> None:
    dtype = DTYPES[arguments.dtype]
    device = choose_device(arguments.device, dtype)
    most = usable_cores() if device.type == "cpu" else torch.cuda.device_count()
    ranks = arguments.ranks or (min(2, most) if device.type == "cpu" else most)
    if ranks > most:
        what = "cores that this process may use" if device.type == "cpu" else "GPUs that torch sees"
        raise UserError(f"--ranks: must be at most {most}, the {what}, got {ranks}")
    task = Task(
        shape=MODEL_SHAPES[arguments.model or "llama-3.3-70b"] if arguments.model or device.type == "cuda" else SMALL,
        tp=arguments.tp or (8 if device.type == "cuda" else ranks),
        dtype=dtype,
        quick=arguments.quick,
        link=emulated_link(arguments, device, ranks),
    )
    try:
        task.shape.check_world_size(task.tp)
    except ValueError as error:
        raise UserError(f"--tp: {error}") from error
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {arguments.output}: cannot make its folder: {error.strerror}") from error
    with progress() as bar:
        line = bar.add_task("measuring", total=len(measure.STEPS) + 1)

        def on_step(name: str) -> None:
            bar.update(line, advance=1, description=f"measured: {name}")

        profile, found, why_no_link = calibrate(device, ranks, task, on_step)
    print_profile(profile, found)
    if any(each.error is not None and each.error > LARGE_ERROR for each in found.values()):
        console().print("Errors this large mostly mean that something else was running: measure again without it.")
    if why_no_link is not None:
        console().print(f"The link between ranks was not measured ({why_no_link}); its built-in values stay.")
    if task.link is not None:
        console().print(f"The link is an {task.link}.")
    try:
        profile.save(arguments.output)
    except OSError as error:
        raise UserError(f"--output {arguments.output}: cannot be written: {error.strerror}") from error
    console().print(f"Profile: {arguments.output}. It holds for this device alone, and is refused on others.")
