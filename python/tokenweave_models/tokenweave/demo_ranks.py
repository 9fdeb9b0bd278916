"""The tensor-parallel part of `tokenweave demo`: the decoder on several processes of this CPU, separate against fused.

Each rank makes the same random decoder from the seed and keeps its share of it. The table begins with one process that
has the whole decoder, and the float64 run of the same weights is the truth for all.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import tokenweave_ops
from tokenweave_models.common.console import console, print_table, progress
from tokenweave_models.common.errors import UserError
from tokenweave_models.common.ranks import RankFailed, run_ranks, usable_cores
from tokenweave_models.tokenweave.model import ModelConfig, random_decoder
from tokenweave_models.tokenweave.tensor_parallel import FusedReduction, SeparateReduction, shard
from tokenweave_models.tokenweave.timing import timed_pass

MIN_PASSES = 3
PASSES_BUDGET_S = 14.0
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Row:
    """One way to run the decoder, and what came out of it."""

    label: str
    layer_ms: float
    norms_ms: float  # what of it is spent in sums over ranks, additions and norms
    logits: Tensor


@dataclass(frozen=True)
class RankRun:
    """What one rank saw, by mode."""

    pass_ms: dict[str, list[tuple[float, list[float]]]]  # as timed_pass gives them
    logits: dict[str, np.ndarray]


def why_not(world_size: int, device: torch.device) -> str | None:
    """Why there is no tensor-parallel run, in one sentence; None if there can be one."""
    if world_size == 1:
        return "--ranks 1 was asked for."
    if device.type != "cpu":
        return "it runs on the CPU; `tokenweave demo --device cpu` shows it."
    if not (dist.is_available() and dist.is_gloo_available()):
        return "this torch was built without gloo."
    if usable_cores() < world_size:
        return f"{world_size} processes need as many cores, and this one may use {usable_cores()}."
    return None


def check(config: ModelConfig, world_size: int, dtype: torch.dtype) -> None:
    """Says what does not fit before anything slow is started."""
    try:
        config.check_world_size(world_size)
        tokenweave_ops.Workspace.virtual(world_size, 1, config.hidden, dtype).close()
    except ValueError as error:
        raise UserError(f"{error}; --ranks sets the world size, 1 leaves ranks out") from error


@torch.inference_mode()
def run_modes(
    group, report, config: ModelConfig, seed: int, dtype: torch.dtype, tokens: np.ndarray, passes: int
) -> RankRun | str:
    """What each rank does. Returns a sentence instead if the ranks cannot share memory."""
    tokens = torch.from_numpy(tokens)
    try:
        workspace = tokenweave_ops.Workspace(
            group, tokens.numel(), config.hidden, dtype, device="cpu", staging=False, num_channels=1
        )
    except tokenweave_ops.CommunicationError as error:
        return str(error)
    with workspace:
        model = shard(random_decoder(config, seed).to(dtype), group.rank(), group.size())
        modes = {
            "separate": SeparateReduction(group, tokens.numel(), config.hidden, dtype),
            "fused": FusedReduction(workspace),
        }
        logits = {}
        for name, norms in modes.items():  # also the warm-up
            logits[name] = model(tokens, norms).float().numpy()
            report("warm-up")
        pass_ms: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in modes}
        deadline_s = perf_counter() + PASSES_BUDGET_S
        for done in range(passes):
            # One clock decides for all. Ranks also begin a pass together.
            stop = torch.tensor(done >= MIN_PASSES and perf_counter() > deadline_s, dtype=torch.int32)
            dist.broadcast(stop, src=0, group=group)
            if stop.item():
                break
            for name, norms in modes.items():
                pass_ms[name].append(timed_pass(model, tokens, norms))
                report("pass")
    return RankRun(pass_ms, logits)


def run(
    arguments: argparse.Namespace,
    config: ModelConfig,
    dtype: torch.dtype,
    tokens: Tensor,
    one_process: Row,
    truth: Tensor,
    output: Path,
) -> str | None:
    """Runs the ranks, prints and writes what came out. Returns a sentence instead if they cannot share memory."""
    world_size = arguments.ranks
    console().print(
        f"The same decoder tensor-parallel: {world_size} processes on this CPU, each with 1/{world_size} of every "
        f"layer's heads and MLP.\nTwice per layer they sum up what they have, add the residual and norm: by gloo's "
        f"all_reduce and then add_rms_norm_,\nor in one pass over shared memory by allreduce_rmsnorm_."
    )
    with progress() as bar:
        start = bar.add_task(f"{world_size} processes start and make their weights", total=1)
        passes = bar.add_task("timed passes, modes in turn", total=2 * arguments.passes)

        def on_report(stage: str) -> None:
            bar.update(start, completed=1)
            if stage == "pass":
                bar.advance(passes, 1 / world_size)

        try:
            runs = run_ranks(
                run_modes,
                world_size,
                *(config, arguments.seed, dtype, tokens.numpy(), arguments.passes),
                timeout_s=TIMEOUT_S,
                on_report=on_report,
            )
        except RankFailed as error:
            raise UserError(f"tensor-parallel run: {error}") from error
        if any(isinstance(rank, str) for rank in runs):
            return next(rank for rank in runs if isinstance(rank, str))
        done = 2 * len(runs[0].pass_ms["fused"])
        bar.update(passes, completed=done, total=done)

    names = {"separate": "all_reduce, add_rms_norm_", "fused": "allreduce_rmsnorm_"}
    rows = {
        name: Row(
            f"{world_size} processes, {ops}", *layer_times(runs, name, config), torch.from_numpy(runs[0].logits[name])
        )
        for name, ops in names.items()
    }
    same_bits = all(np.array_equal(runs[0].logits[name], rank.logits[name]) for rank in runs for name in names)
    print_and_write({"one_process": one_process, **rows}, truth, same_bits, len(runs[0].pass_ms["fused"]), output)
    return None


def layer_times(runs: list[RankRun], mode: str, config: ModelConfig) -> tuple[float, float]:
    """(ms per layer, of it in sums, additions and norms): medians over passes.

    A pass takes as long as its slowest rank. A call counts with its shortest time, that of the rank which came last to
    it: the others also waited for the matrix products of that rank, which is not the call's doing.
    """
    passes = list(zip(*(rank.pass_ms[mode] for rank in runs), strict=True))
    whole = median(max(whole for whole, _ in ranks) for ranks in passes)
    norms = median(sum(map(min, *(calls for _, calls in ranks))) for ranks in passes)
    return whole / config.num_layers, norms / config.num_layers


def print_and_write(rows: dict[str, Row], truth: Tensor, same_bits: bool, passes: int, output: Path) -> None:
    best = truth.argmax(-1)
    results = {
        name: {
            "layer_ms": row.layer_ms,
            "norms_ms": row.norms_ms,
            "max_error": (row.logits.double() - truth).abs().max().item(),
            "same_next_byte": (row.logits.argmax(-1) == best).double().mean().item(),
        }
        for name, row in rows.items()
    }
    print_table(
        "One decoder in one process and over ranks",
        ("", "ms / layer", "of it sum + add + norm", "error of logits", "float64's next byte"),
        [
            (
                rows[name].label,
                f"{r['layer_ms']:.3f}",
                f"{r['norms_ms']:.3f}",
                f"{r['max_error']:.2e}",
                f"{r['same_next_byte']:.1%}",
            )
            for name, r in results.items()
        ],
    )
    separate, fused = rows["separate"], rows["fused"]
    difference = (separate.logits.double() - fused.logits.double()).abs().max().item()
    agreement = (separate.logits.argmax(-1) == fused.logits.argmax(-1)).double().mean().item()
    console().print(
        f"Times over ranks are medians over {passes} passes of each, taken in turn. A sum counts from when the last "
        f"rank came to it.\n"
        f"Separate time over fused: {separate.norms_ms / fused.norms_ms:.2f} for sum + add + norm, "
        f"{separate.layer_ms / fused.layer_ms:.2f} for the whole layer.\n"
        f"Logits of the two: at most {difference:.2e} apart, same next byte at {agreement:.1%} of positions; "
        f"{'all ranks hold the same bits' if same_bits else 'the bits differ between ranks'}."
    )
    report = {
        "rows": results,
        "passes": passes,
        "max_difference": difference,
        "same_next_byte": agreement,
        "ranks_hold_the_same_bits": same_bits,
    }
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
