"""Text that goes on from prompts: all of them in one continuous batch, one of them as it comes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter

from tokenweave_models.common.arguments import positive
from tokenweave_models.common.errors import UserError
from tokenweave_models.common.tokenizer import ByteTokenizer, FolderTokenizer, TextStream, Tokenizer
from tokenweave_models.tokenweave.config import ModelConfig
from tokenweave_models.tokenweave.runner import options
from tokenweave_models.tokenweave.runner.engine import Engine
from tokenweave_models.tokenweave.runner.ranks import Ranks
from tokenweave_models.tokenweave.runner.reporting import Reporter
from tokenweave_models.tokenweave.runner.sampling import SamplingParams
from tokenweave_models.tokenweave.runner.serving import Request, Scheduler
from tokenweave_models.tokenweave.runner.session import MODES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="none: read from standard input, one per line")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="prompts, one per line")
    parser.add_argument("--mode", choices=MODES, default="weave")
    parser.add_argument("--max-new-tokens", type=positive, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-k", type=int, default=0, help="draw from this many likeliest tokens; 0: from all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest that reach this probability")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--chunk", type=positive, default=512, help="tokens per pass at most")
    parser.add_argument("--slots", type=positive, default=8, help="prompts under way at most")
    parser.add_argument("--json", type=Path, metavar="FILE")


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompts:
        return arguments.prompts
    if arguments.prompts_file is None:
        text = sys.stdin.read()
    else:
        try:
            text = arguments.prompts_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts-file {arguments.prompts_file}: cannot be read: {error}") from error
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError("there is no prompt: give some as arguments, in --prompts-file or on standard input")
    return prompts


def tokenizer_of(arguments: argparse.Namespace, config: ModelConfig) -> Tokenizer:
    found = ByteTokenizer() if arguments.model is None else FolderTokenizer(arguments.model)
    if arguments.model is None and config.vocab_size != found.vocab_size:
        raise UserError(
            f"a random model speaks bytes: --vocab must be {found.vocab_size} to generate, got {config.vocab_size}"
        )
    return found


def requests_of(prompts: list[str], tokenizer: Tokenizer, config: ModelConfig, max_new_tokens: int) -> list[Request]:
    requests = []
    for number, prompt in enumerate(prompts):
        tokens = tokenizer.encode(prompt).tolist()
        if not tokens:
            raise UserError(f"prompt {number} has no tokens")
        if max(tokens) >= config.vocab_size:
            raise UserError(
                f"prompt {number} has token {max(tokens)}, and the model knows tokens below {config.vocab_size}: "
                "tokenizer.json does not belong to config.json"
            )
        requests.append(Request(number, tokens, max_new_tokens, tokenizer.eos_tokens))
    return requests


def run(arguments: argparse.Namespace, ranks: Ranks, reporter: Reporter) -> None:
    with options.refused_in_words():
        sampling = SamplingParams(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    ranks.on_first(lambda: options.check_outputs(arguments.json))
    config = ranks.attempt(lambda: options.config_of(arguments))
    tokenizer = ranks.attempt(lambda: tokenizer_of(arguments, config))
    prompts = ranks.on_first(lambda: read_prompts(arguments))  # standard input is there once
    requests = requests_of(prompts, tokenizer, config, arguments.max_new_tokens)
    max_len = max(len(request.prompt) for request in requests) + arguments.max_new_tokens - 1
    num_slots = min(arguments.slots, len(requests), arguments.chunk)  # all of them advance in every pass
    with options.refused_in_words():
        scheduler = Scheduler(num_slots, arguments.chunk, max_len)
        for request in requests:
            scheduler.add(request)
    with options.make_session(
        arguments, ranks, reporter, config, [arguments.mode],
        max_tokens=arguments.chunk, num_slots=num_slots, max_len=max_len,
    ) as session:  # fmt: skip
        executor = session.executors[arguments.mode]
        engine = Engine(executor, scheduler, sampling, lambda batch: session.plan(arguments.mode, batch))
        begin_s = perf_counter()
        show = stream_one if len(requests) == 1 else show_all
        show(engine, requests, tokenizer, reporter)
        seconds = perf_counter() - begin_s
        facts = options.facts_of(arguments, ranks, config, session)
    num_prompt = sum(len(request.prompt) for request in requests)
    num_new = sum(len(request.generated) for request in requests)
    reporter.print(
        f"{num_new} new tokens after {num_prompt} of prompt in {seconds:.2f} s: {num_new / seconds:.1f} tokens/s "
        f"({options.setting_of(arguments, ranks, config, session)}, {arguments.mode})"
    )
    texts = [
        {
            "prompt": prompt,
            "prompt_tokens": list(request.prompt),
            "tokens": request.generated,
            "text": tokenizer.decode(request.generated),
        }
        for prompt, request in zip(prompts, requests, strict=True)
    ]
    results = {"mode": arguments.mode, "sampling": vars(sampling), "seconds": seconds, "results": texts}
    reporter.write_json(arguments.json, facts | results)


def stream_one(engine: Engine, requests: list[Request], tokenizer: Tokenizer, reporter: Reporter) -> None:
    """The text as it comes, behind its prompt."""
    stream = TextStream(tokenizer.decode)
    reporter.write(tokenizer.decode(requests[0].prompt))
    while not engine.scheduler.is_idle:
        for _, token in engine.step():
            reporter.write(stream.add(token))
    reporter.write(stream.end() + "\n")


def show_all(engine: Engine, requests: list[Request], tokenizer: Tokenizer, reporter: Reporter) -> None:
    """Progress, then all texts in the order of the prompts."""
    with reporter.progress() as bar:
        task = bar.add_task("new tokens", total=sum(request.max_new_tokens for request in requests))
        while not engine.scheduler.is_idle:
            for request, _ in engine.step():
                bar.advance(task)
                if request.is_finished:  # perhaps earlier than its limit
                    bar.advance(task, request.max_new_tokens - len(request.generated))
    for request in requests:
        reporter.print(f"[{request.number}] {tokenizer.decode([*request.prompt, *request.generated])}")
