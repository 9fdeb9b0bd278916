"""How long a prompt takes, from its first token to the logits of its last, by mode and number of tokens.

Modes take turns pass by pass, so that what disturbs the machine disturbs all of them alike. A pass begins on all ranks
together and takes as long as on the slowest.
"""

from __future__ import annotations

import argparse
from time import perf_counter

import numpy as np
import torch

from tokenweave_models.common.arguments import positive
from tokenweave_models.common.errors import UserError
from tokenweave_models.tokenweave.batch import Batch
from tokenweave_models.tokenweave.runner import options
from tokenweave_models.tokenweave.runner.planning import describe
from tokenweave_models.tokenweave.runner.ranks import Ranks
from tokenweave_models.tokenweave.runner.reporting import Reporter
from tokenweave_models.tokenweave.runner.session import NO_LINK, Session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    options.add_bench_arguments(parser)
    parser.add_argument("--tokens", type=positive, nargs="+", default=[256, 512, 1024], help="of the prompt")
    parser.add_argument("--passes", type=positive, default=10, help="timed passes of each mode")
    parser.add_argument(
        "--launch",
        choices=("eager", "graph"),
        default="eager",
        help="kernel by kernel, or as one CUDA graph (GPUs only)",
    )
    parser.add_argument("--warm-up", type=positive, default=2, help="passes of each mode before")


def prompt_of(num_tokens: int, vocab_size: int, seed: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (num_tokens,), generator=generator).to(device)
    return Batch.of(tokens, [num_tokens], [num_tokens], [0])


@torch.inference_mode()
def time_modes(
    session: Session, batch: Batch, warm_up: int, passes: int, on_pass, launch: str = "eager"
) -> dict[str, list[float]]:
    """Milliseconds of each pass by mode, the slowest rank's."""
    modes = list(session.executors)
    prefill = {mode: session.prefill_call(mode, batch, launch) for mode in modes}
    for _ in range(warm_up):
        for mode in modes:
            prefill[mode]()
            on_pass()
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    for done in range(passes):
        for mode in modes[done % len(modes) :] + modes[: done % len(modes)]:  # nobody always follows the same one
            session.synchronize()
            session.ranks.barrier()
            begin_s = perf_counter()
            prefill[mode]()
            session.synchronize()
            seconds[mode].append(perf_counter() - begin_s)
            on_pass()
    return {mode: [s * 1e3 for s in session.ranks.slowest(times)] for mode, times in seconds.items()}


def injected_ms(session: Session, num_tokens: int) -> float:
    """What the emulated link adds to an unsplit pass that hides nothing: a reduction after the embedding and after each
    sublayer."""
    config = session.model.config
    op_bytes = num_tokens * config.hidden * session.dtype.itemsize
    return (2 * config.num_layers + 1) * session.link.occupied_us(op_bytes, session.ranks.world_size) * 1e-3


def hidden_shares(pass_ms: dict[str, list[float]], injected: float) -> tuple[float | None, float | None]:
    """(what weave saves over fused, and what it does not lose against a link that costs nothing), both as shares of the
    injected time: medians over passes that were taken in the same turn. The second also counts what splitting itself
    costs; None where a mode was left out."""

    def slower_by(one: str, other: str) -> float:
        return float(np.median(np.subtract(pass_ms[one], pass_ms[other])))

    if "weave" not in pass_ms:
        return None, None
    saved = slower_by("fused", "weave") / injected if "fused" in pass_ms else None
    return saved, 1 - slower_by("weave", NO_LINK) / injected


def run(arguments: argparse.Namespace, ranks: Ranks, reporter: Reporter) -> None:
    ranks.on_first(lambda: options.check_outputs(arguments.json, arguments.png))
    config = ranks.attempt(lambda: options.config_of(arguments))
    if len(set(arguments.tokens)) != len(arguments.tokens):
        raise UserError(f"--tokens: each number once, got {' '.join(map(str, arguments.tokens))}")
    if arguments.launch == "graph" and ranks.device.type != "cuda":
        raise UserError("--launch graph: only GPUs have CUDA graphs")
    modes = [*arguments.modes, *([NO_LINK] if arguments.link_gb_s is not None else ())]
    longest = max(arguments.tokens)
    with options.make_session(
        arguments,
        ranks,
        reporter,
        config,
        modes,
        max_tokens=longest,
        num_slots=1,
        max_len=longest,
        launch=arguments.launch,
    ) as session:
        rows = []
        with reporter.progress() as bar:
            each = (arguments.warm_up + arguments.passes) * len(modes)
            task = bar.add_task("passes, modes in turn", total=each * len(arguments.tokens))
            for num_tokens in arguments.tokens:
                batch = prompt_of(num_tokens, config.vocab_size, arguments.seed, ranks.device)
                pass_ms = time_modes(
                    session, batch, arguments.warm_up, arguments.passes, lambda: bar.advance(task), arguments.launch
                )
                rows.append(row_of(session, batch, pass_ms))
        setting = options.setting_of(arguments, ranks, config, session)
        report = options.facts_of(arguments, ranks, config, session) | {
            "launch": arguments.launch, "passes": arguments.passes, "rows": rows
        }  # fmt: skip
    print_rows(reporter, setting, report)
    reporter.write_json(arguments.json, report)
    if arguments.png is not None and ranks.is_first:
        from tokenweave_models.tokenweave.runner import plots

        plots.draw_prefill(report, setting, arguments.png)
        reporter.print(f"Written: {arguments.png}")


def row_of(session: Session, batch: Batch, pass_ms: dict[str, list[float]]) -> dict:
    plan = session.plan("weave", batch)
    row = {
        "tokens": batch.num_tokens,
        "modes": {
            mode: {
                "ms": float(np.median(times)),
                "ms_p20": float(np.percentile(times, 20)),
                "ms_p80": float(np.percentile(times, 80)),
                "each_ms": times,
            }
            for mode, times in pass_ms.items()
        },
        "plan": {"kind": plan.kind, "split": plan.split},
        "predicted_us": dict(plan.predicted_us),
    }
    if session.link is not None:
        injected = injected_ms(session, batch.num_tokens)
        saved, strict = hidden_shares(pass_ms, injected)
        row |= {"injected_ms": injected, "hidden_share": saved, "hidden_share_strict": strict}
    return row


def print_rows(reporter: Reporter, setting: str, report: dict) -> None:
    rows = report["rows"]
    modes = list(rows[0]["modes"])
    columns = ["tokens", *(f"{mode} ms" for mode in modes), "plan of weave"]
    is_emulated = report["emulated_link"] is not None
    if is_emulated:
        columns += ["injected ms", "hidden", "strictly"]
    cells = []
    for row in rows:
        line = [str(row["tokens"]), *(f"{row['modes'][mode]['ms']:.2f}" for mode in modes), describe(**row["plan"])]
        if is_emulated:
            shares = (row["hidden_share"], row["hidden_share_strict"])
            line += [f"{row['injected_ms']:.2f}", *("" if share is None else f"{share:.0%}" for share in shares)]
        cells.append(line)
    reporter.table(f"Prefill latency, {setting}", columns, cells)
    reporter.print(
        f"Medians of {report['passes']} passes of each mode, taken in turn; a pass counts as on the slowest rank"
        f"{', launched as one CUDA graph' * (report['launch'] == 'graph')}."
    )
    if is_emulated:
        reporter.print(
            "Emulated link: ranks share this machine's memory and sleep for as long as such a link would take; "
            "nothing here is the speed of a real link.\n"
            f"hidden: (fused - weave) / injected; strictly: 1 - (weave - fused with {NO_LINK}) / injected."
        )
