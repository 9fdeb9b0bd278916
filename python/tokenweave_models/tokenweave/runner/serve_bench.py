"""A stream of requests that come when they come, served by continuous batching with chunked prefill, mode by mode.

Arrivals are Poisson and do not wait for the server: a slow mode gathers a queue, and its latencies say so. All modes
get the same requests at the same times. Rank 0's clock decides which requests a pass sees and tells the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter, sleep

import numpy as np

from tokenweave_models.common.arguments import positive
from tokenweave_models.common.errors import UserError
from tokenweave_models.tokenweave.batch import Batch
from tokenweave_models.tokenweave.runner import options
from tokenweave_models.tokenweave.runner.engine import Engine
from tokenweave_models.tokenweave.runner.ranks import Ranks
from tokenweave_models.tokenweave.runner.reporting import Reporter
from tokenweave_models.tokenweave.runner.sampling import SamplingParams
from tokenweave_models.tokenweave.runner.serving import Request, Scheduler
from tokenweave_models.tokenweave.runner.session import Session

PERCENTILES = (50, 90, 99)
WARM_UP_REQUESTS = 2
LONGEST_SLEEP_S = 1.0  # the other ranks wait for rank 0 meanwhile, and their wait has a deadline


def length_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    bounds = positive(low), positive(high or low)
    if bounds[0] > bounds[1]:
        raise argparse.ArgumentTypeError(f"must be N or LOW:HIGH, got {text}")
    return bounds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    options.add_bench_arguments(parser)
    parser.add_argument("--requests", type=positive, default=32)
    parser.add_argument(
        "--rate", type=options.positive_number, default=4.0, help="requests per second on average; inf: all at once"
    )
    parser.add_argument("--prompt-len", type=length_range, default=(64, 256), metavar="N|LOW:HIGH", help="drawn evenly")
    parser.add_argument("--output-len", type=length_range, default=(16, 32), metavar="N|LOW:HIGH")
    parser.add_argument("--chunk", type=positive, default=256, help="tokens per pass at most")
    parser.add_argument("--slots", type=positive, default=8, help="requests under way at most")


@dataclass(frozen=True)
class Arrival:
    number: int
    at_s: float  # after the beginning
    prompt: list[int]
    output_len: int

    def request(self) -> Request:
        return Request(self.number, self.prompt, self.output_len)


def arrivals_of(arguments: argparse.Namespace, vocab_size: int) -> list[Arrival]:
    """The same on every rank. Lengths and tokens do not depend on the rate."""
    rng = np.random.default_rng(arguments.seed)
    at_s = 0.0
    arrivals = []
    for number in range(arguments.requests):
        prompt_len, output_len = (
            int(rng.integers(low, high + 1)) for low, high in (arguments.prompt_len, arguments.output_len)
        )
        prompt = rng.integers(vocab_size, size=prompt_len).tolist()
        at_s += rng.exponential() / arguments.rate
        arrivals.append(Arrival(number, at_s, prompt, output_len))
    return arrivals


@dataclass
class Served:
    """What became of one request; seconds after the beginning."""

    at_s: float
    tokens: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)

    @property
    def first_s(self) -> float:
        return self.token_s[0] - self.at_s

    @property
    def whole_s(self) -> float:
        return self.token_s[-1] - self.at_s

    @property
    def per_token_s(self) -> float | None:
        """Between tokens; None for a request with one."""
        return (self.token_s[-1] - self.token_s[0]) / (len(self.tokens) - 1) if len(self.tokens) > 1 else None


@dataclass
class Passes:
    """How many passes there were, how large, and how many were split."""

    count: int = 0
    tokens: int = 0
    split: int = 0


def serve(
    session: Session,
    mode: str,
    arrivals: list[Arrival],
    *,
    num_slots: int,
    chunk: int,
    on_done: Callable[[], None] = lambda: None,
) -> tuple[list[Served], Passes]:
    """Serves them all. Collective."""
    ranks, passes = session.ranks, Passes()

    def plan(batch: Batch):
        found = session.plan(mode, batch)
        passes.count += 1
        passes.tokens += batch.num_tokens
        passes.split += found is not None and found.kind == "split"
        return found

    scheduler = Scheduler(num_slots, chunk, session.cache.max_len)
    engine = Engine(session.executors[mode], scheduler, SamplingParams(), plan)
    served = {arrival.number: Served(arrival.at_s) for arrival in arrivals}
    num_arrived = 0
    session.synchronize()
    ranks.barrier()
    begin_s = perf_counter()
    while num_arrived < len(arrivals) or not scheduler.is_idle:
        if ranks.is_first and scheduler.is_idle:
            sleep(min(LONGEST_SLEEP_S, max(0.0, arrivals[num_arrived].at_s - (perf_counter() - begin_s))))
        now_s = perf_counter() - begin_s
        known = sum(arrival.at_s <= now_s for arrival in arrivals[num_arrived:])
        known = ranks.broadcast(num_arrived + known)
        for arrival in arrivals[num_arrived:known]:
            scheduler.add(arrival.request())
        num_arrived = known
        new_tokens = engine.step()
        now_s = perf_counter() - begin_s
        for request, token in new_tokens:
            served[request.number].tokens.append(token)
            served[request.number].token_s.append(now_s)
            if request.is_finished:
                on_done()
    return list(served.values()), passes


def summary_of(served: list[Served], arrivals: list[Arrival], passes: Passes) -> dict:
    """Throughput from the first arrival to the last token, and percentiles of the latencies."""
    seconds = max(one.token_s[-1] for one in served) - min(one.at_s for one in served)
    output_tokens = sum(len(one.tokens) for one in served)
    latencies = {
        "first_token": [one.first_s for one in served],
        "per_output_token": [one.per_token_s for one in served if one.per_token_s is not None],
        "whole_request": [one.whole_s for one in served],
    }
    return {
        "seconds": seconds,
        "output_tokens_per_s": output_tokens / seconds,
        "all_tokens_per_s": (output_tokens + sum(len(arrival.prompt) for arrival in arrivals)) / seconds,
        "ms": {
            name: {f"p{percent}": float(np.percentile(times, percent)) * 1e3 for percent in PERCENTILES}
            for name, times in latencies.items()
            if times
        },
        "passes": passes.count,
        "split_passes": passes.split,
        "tokens_per_pass": passes.tokens / passes.count,
        "generated": [one.tokens for one in served],
    }


def run(arguments: argparse.Namespace, ranks: Ranks, reporter: Reporter) -> None:
    ranks.on_first(lambda: options.check_outputs(arguments.json, arguments.png))
    config = ranks.attempt(lambda: options.config_of(arguments))
    arrivals = arrivals_of(arguments, config.vocab_size)
    max_len = arguments.prompt_len[1] + arguments.output_len[1] - 1
    batching = {"num_slots": arguments.slots, "chunk": arguments.chunk}
    if arguments.chunk < arguments.slots:
        raise UserError(
            f"--chunk must be at least --slots={arguments.slots}, so that all requests advance, got {arguments.chunk}"
        )
    with options.make_session(
        arguments, ranks, reporter, config, arguments.modes,
        max_tokens=arguments.chunk, num_slots=arguments.slots, max_len=max_len,
    ) as session:  # fmt: skip
        summaries = {}
        with reporter.progress() as bar:
            tasks = {mode: bar.add_task(f"{mode}: requests", total=len(arrivals)) for mode in arguments.modes}
            for mode, task in tasks.items():
                serve(session, mode, arrivals[:WARM_UP_REQUESTS], **batching)
                outcome = serve(session, mode, arrivals, **batching, on_done=lambda task=task: bar.advance(task))
                summaries[mode] = summary_of(outcome[0], arrivals, outcome[1])
        setting = options.setting_of(arguments, ranks, config, session)
        report = options.facts_of(arguments, ranks, config, session)
    report |= {
        "rate": arguments.rate if np.isfinite(arguments.rate) else None,
        "requests": [
            {"at_s": arrival.at_s, "prompt_len": len(arrival.prompt), "output_len": arrival.output_len}
            for arrival in arrivals
        ],
        "chunk": arguments.chunk,
        "slots": arguments.slots,
        "modes": summaries,
    }
    print_summaries(reporter, setting, report)
    reporter.write_json(arguments.json, report)
    if arguments.png is not None and ranks.is_first:
        from tokenweave_models.tokenweave.runner import plots

        plots.draw_serving(report, setting, arguments.png)
        reporter.print(f"Written: {arguments.png}")


def print_summaries(reporter: Reporter, setting: str, report: dict) -> None:
    latencies = ("first_token", "per_output_token", "whole_request")
    titles = ("first token", "per output token", "whole request")
    rows = []
    for mode, found in report["modes"].items():
        percentiles = [
            "/".join(f"{ms:.{ms < 100:d}f}" for ms in found["ms"].get(name, {}).values()) for name in latencies
        ]
        speeds = (f"{found['output_tokens_per_s']:.1f}", f"{found['all_tokens_per_s']:.1f}")
        rows.append([mode, *speeds, *percentiles, f"{found['split_passes']} of {found['passes']}"])
    labels = [f"{title} ms, p{'/'.join(map(str, PERCENTILES))}" for title in titles]
    rate = "all at once" if report["rate"] is None else f"{report['rate']:g} per second"
    reporter.table(
        f"Serving {len(report['requests'])} requests, {rate}, {setting}",
        ("mode", "output tokens/s", "tokens/s", *labels, "passes split"),
        rows,
    )
    if len(report["modes"]) > 1:
        generated = [found["generated"] for found in report["modes"].values()]
        equal = sum(len({tuple(tokens) for tokens in same}) == 1 for same in zip(*generated, strict=True))
        reporter.print(f"{equal} of {len(generated[0])} requests got the same tokens in all modes.")
    if report["emulated_link"] is not None:
        reporter.print(
            "Emulated link: ranks share this machine's memory and sleep for as long as such a link would take; "
            "nothing here is the speed of a real link."
        )
