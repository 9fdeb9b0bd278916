"""The tensor-parallel part of `tokenweave demo`: the decoder on several processes of this CPU, in the three modes.

Each rank makes the same random decoder from the seed and keeps its share of it. The table begins with one process that
has the whole decoder, and the float64 run of the same weights is the truth for all.

Between processes of one CPU a sum takes next to no time, so there is nothing to hide. `fused` and `weave` therefore run
once more over an emulated link, whose transfers take the share of a pass that they take on real machines.
"""

import argparse
import json
from contextlib import ExitStack
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
from tokenweave_models.tokenweave.config import ModelConfig
from tokenweave_models.tokenweave.executor import Executor
from tokenweave_models.tokenweave.lanes import ThreadLane
from tokenweave_models.tokenweave.model import random_decoder
from tokenweave_models.tokenweave.passes import prefill_executor, prefill_logits, timed_prefill
from tokenweave_models.tokenweave.reduction import FusedReduction, SeparateReduction
from tokenweave_models.tokenweave.tensor_parallel import shard

MODES = {
    "reference": "all_reduce, add_rms_norm_",
    "fused": "allreduce_rmsnorm_",
    "fused_link": "emulated link, fused",
    "weave_link": "emulated link, weave",
}
LINK_SHARE = 0.2  # of a pass without a link: what all-reduce costs a 70B model on 8 GPUs, by TokenWeave's figure 1
LINK_LATENCY_US = 20.0
MIN_PASSES = 3
PASSES_BUDGET_S = 20.0
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

    pass_ms: dict[str, list[tuple[float, list[float]]]]  # as timed_prefill gives them
    logits: dict[str, np.ndarray]
    link: str  # the emulated link in words
    link_ms: float  # for which it is busy in one pass of fused_link


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
    num_tokens = tokens.numel()
    sizes = num_tokens, config.hidden, dtype

    def workspace(**options) -> tokenweave_ops.Workspace:
        return tokenweave_ops.Workspace(group, *sizes, device="cpu", staging=False, **options)

    with ExitStack() as stack:
        try:
            plain = stack.enter_context(workspace())
        except tokenweave_ops.CommunicationError as error:
            return str(error)
        model = shard(random_decoder(config, seed).to(dtype), group.rank(), group.size())

        def executor(reduction, **options) -> Executor:
            return stack.enter_context(prefill_executor(model, tokens, reduction, group=group, **options))

        executors = {
            "reference": executor(SeparateReduction(group, *sizes)), "fused": executor(FusedReduction(plain))
        }  # fmt: skip
        logits = {}

        def warm_up(mode: str) -> None:
            logits[mode] = prefill_logits(executors[mode], tokens, plans.get(mode)).float().numpy()
            report("warm-up")

        # Both halves need a token; more about where to cut is the planner's.
        plans = {"weave_link": half_and_half(num_tokens)} if num_tokens > 1 else {}
        for mode in tuple(executors):
            warm_up(mode)
        link, link_ms = link_for(timed_prefill(executors["fused"], tokens)[0], num_tokens, config, dtype, group)
        over_link = FusedReduction(stack.enter_context(workspace(link=link)))
        executors["fused_link"] = executor(over_link)
        executors["weave_link"] = executor(over_link, lane=ThreadLane())
        for mode in ("fused_link", "weave_link"):
            warm_up(mode)

        pass_ms: dict[str, list[tuple[float, list[float]]]] = {mode: [] for mode in executors}
        deadline_s = perf_counter() + PASSES_BUDGET_S
        for done in range(passes):
            # One clock decides for all. Ranks also begin a pass together.
            stop = torch.tensor(done >= MIN_PASSES and perf_counter() > deadline_s, dtype=torch.int32)
            dist.broadcast(stop, src=0, group=group)
            if stop.item():
                break
            for mode, one in executors.items():
                pass_ms[mode].append(timed_prefill(one, tokens, plans.get(mode)))
                report("pass")
    return RankRun(pass_ms, logits, f"{link.gigabytes_per_s:.3g} GB/s, {link.latency_us:g} us", link_ms)


def half_and_half(num_tokens: int) -> tokenweave_ops.SplitPlan:
    return tokenweave_ops.SplitPlan(num_tokens, "split", num_tokens // 2, 0, 0, 0, launch="eager", predicted_us={})


def link_for(
    pass_ms: float, num_tokens: int, config: ModelConfig, dtype: torch.dtype, group: dist.ProcessGroup
) -> tuple[tokenweave_ops.EmulatedLink, float]:
    """A link that is busy for LINK_SHARE of a pass of pass_ms, by rank 0's clock; and for how many milliseconds."""
    link_ms = torch.tensor(LINK_SHARE * pass_ms, dtype=torch.float64)
    dist.broadcast(link_ms, src=0, group=group)
    calls = 2 * config.num_layers + 1
    call_us = max(link_ms.item() * 1e3 / calls - LINK_LATENCY_US, 1.0)
    num_bytes = num_tokens * config.hidden * dtype.itemsize
    moved = num_bytes * (1 + 1 / group.size())
    link = tokenweave_ops.EmulatedLink(gigabytes_per_s=moved / call_us / 1e3, latency_us=LINK_LATENCY_US)
    return link, calls * link.occupied_us(num_bytes, group.size()) / 1e3


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
        f"all_reduce and then add_rms_norm_,\nor in one pass over shared memory by allreduce_rmsnorm_. Then over an "
        f"emulated link, a wait without work,\nas slow as real links are beside real matrix products: fused, and "
        f"weave, which hides one half's transfer behind the\nother half's compute."
    )
    with progress() as bar:
        start = bar.add_task(f"{world_size} processes start and make their weights", total=1)
        passes = bar.add_task("timed passes, modes in turn", total=len(MODES) * arguments.passes)

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
        done = len(MODES) * len(runs[0].pass_ms["fused"])
        bar.update(passes, completed=done, total=done)

    rows = {
        mode: Row(
            f"{world_size} processes, {words}", *layer_times(runs, mode, config), torch.from_numpy(runs[0].logits[mode])
        )
        for mode, words in MODES.items()
    }
    same_bits = all(np.array_equal(runs[0].logits[mode], rank.logits[mode]) for rank in runs for mode in MODES)
    hidden = (rows["fused_link"].layer_ms - rows["weave_link"].layer_ms) * config.num_layers / runs[0].link_ms
    link = {"link": runs[0].link, "link_ms": runs[0].link_ms / config.num_layers, "hidden_share": hidden}
    passes_done = len(runs[0].pass_ms["fused"])
    print_and_write({"one_process": one_process, **rows}, truth, same_bits, link, passes_done, output)
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


def print_and_write(
    rows: dict[str, Row], truth: Tensor, same_bits: bool, link: dict, passes: int, output: Path
) -> None:
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
    reference, fused = rows["reference"], rows["fused"]
    difference = (reference.logits.double() - fused.logits.double()).abs().max().item()
    agreement = (reference.logits.argmax(-1) == fused.logits.argmax(-1)).double().mean().item()
    console().print(
        f"Times over ranks are medians over {passes} passes of each, taken in turn. A sum counts from when the last "
        f"rank came to it;\nunder weave, only for what of it the matrix products had to wait.\n"
        f"Reference time over fused: {reference.norms_ms / fused.norms_ms:.2f} for sum + add + norm, "
        f"{reference.layer_ms / fused.layer_ms:.2f} for the whole layer.\n"
        f"The emulated link ({link['link']}) is busy for {link['link_ms']:.3f} ms of a layer; weave is faster than "
        f"fused by {link['hidden_share']:.0%} of that.\n"
        f"Logits of reference and fused: at most {difference:.2e} apart, same next byte at {agreement:.1%} of "
        f"positions; {'all ranks hold the same bits' if same_bits else 'the bits differ between ranks'}."
    )
    report = {
        "rows": results,
        "passes": passes,
        "emulated_link": link,
        "max_difference": difference,
        "same_next_byte": agreement,
        "ranks_hold_the_same_bits": same_bits,
    }
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
