"""Where the time of a decoding step goes: model and selector, by policy and cache, beside the published selector.

Every row decodes the same prompts with the same weights. Random weights are sure of nothing, so that most policies
commit a token a step: that says nothing about a trained model, whose steps would take the time that these take.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from tokenweave_models.common.arguments import positive
from tokenweave_models.common.console import console, print_table, progress
from tokenweave_models.common.output import check_output, write_json
from tokenweave_models.localleap.checkpoint import load_model
from tokenweave_models.localleap.config import DREAM_7B, LLADA_8B, ModelConfig, load_config
from tokenweave_models.localleap.generate import Generation, generate, plan_generate
from tokenweave_models.localleap.model import DiffusionModel, random_model
from tokenweave_models.localleap.passes import CACHES
from tokenweave_models.localleap.runner import options
from tokenweave_models.localleap.runner.published_selector import published_selector
from tokenweave_ops import POLICIES

PRESETS = {"llada-8b": LLADA_8B, "dream-7b": DREAM_7B}
PUBLISHED = "published"  # the label of local_leap with the selector as it was published


@dataclass(frozen=True)
class Row:
    cache: str
    policy: str
    steps: int
    tokens: int
    model_ms: float  # of a step, on average
    selector_ms: float
    wall_s: float  # of all steps, with what the host does between them

    @property
    def selector_share(self) -> float:
        return self.selector_ms / (self.model_ms + self.selector_ms)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s


def names_of(known: tuple[str, ...]):
    """The type of an argument that is some of the known names, with commas."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if not set(names) <= set(known) or len(set(names)) != len(names):
            raise argparse.ArgumentTypeError(f"must be some of {', '.join(known)}, got {text}")
        return names

    return parse


GEN_LENGTH = 32
DEFAULTS = {"preset": "llada-8b", "layers": 2, "hidden": 896, "vocab": 0}  # of random weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, metavar="FOLDER", help="real weights; not given: random ones of a preset")
    model.add_argument("--preset", choices=tuple(PRESETS), help="whose sizes random weights have; not given: llada-8b")
    model.add_argument(
        "--layers", type=int, metavar="N", help="of random weights; 0: as many as the preset has; not given: 2"
    )
    model.add_argument(
        "--hidden", type=int, metavar="N", help="heads and MLP are scaled with it; 0: the preset's; not given: 896"
    )
    model.add_argument(
        "--vocab", type=int, metavar="N", help="not given or 0: the preset's, which is what the selector has to read"
    )
    model.add_argument("--dtype", choices=tuple(options.DTYPES), default="bf16")
    model.add_argument("--seed", type=options.seed, default=0, metavar="N", help="of weights and prompts")
    options.add_device(model)
    run = parser.add_argument_group("run")
    run.add_argument("--policies", type=names_of(POLICIES), default=",".join(POLICIES), metavar="A,B", help="which")
    run.add_argument("--caches", type=names_of(CACHES), default=",".join(CACHES), metavar="A,B", help="modes")
    run.add_argument("--batch", type=positive, default=1, metavar="N", help="sequences")
    run.add_argument("--prompt-length", type=positive, default=64, metavar="N", help="tokens, drawn at random")
    options.add_lengths(run, gen_length=GEN_LENGTH)
    run.add_argument("--no-published", action="store_true", help="leave the published selector out")
    run.add_argument("--json", type=Path, metavar="FILE")


def config_of(arguments: argparse.Namespace) -> ModelConfig:
    """The preset with fewer layers and heads; the MLP keeps its ratio to hidden."""
    if arguments.model is not None:
        options.refuse_unused(arguments, "with --model", *DEFAULTS)
        return load_config(arguments.model)
    for name, default in DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    config = PRESETS[arguments.preset]
    hidden = arguments.hidden or config.hidden
    with options.refused_in_words():
        for name in ("layers", "hidden", "vocab"):
            if getattr(arguments, name) < 0:
                raise ValueError(f"--{name} must be at least 0, got {getattr(arguments, name)}")
        if arguments.vocab == 1:
            raise ValueError("--vocab must be 0 or at least 2, got 1")
        group = config.num_heads // config.num_kv_heads
        if hidden % (config.head_dim * group):
            raise ValueError(
                f"--hidden must be a multiple of {config.head_dim * group} for {arguments.preset}, got {hidden}"
            )
        vocab = arguments.vocab or config.vocab_size
        ids = {} if vocab == config.vocab_size else {"mask_id": vocab - 1, "eos_id": 0}
        num_heads = hidden // config.head_dim
        return replace(
            config, hidden=hidden, num_layers=arguments.layers or config.num_layers, num_heads=num_heads,
            num_kv_heads=num_heads // group, intermediate=config.intermediate * hidden // config.hidden,
            vocab_size=vocab, **ids,
        )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    check_output(arguments.json)
    arguments.gen_length = arguments.gen_length or GEN_LENGTH
    dtype = options.DTYPES[arguments.dtype]
    config = config_of(arguments)
    generator = torch.Generator().manual_seed(arguments.seed)
    prompts = torch.randint(config.vocab_size, (arguments.batch, arguments.prompt_length), generator=generator)
    prompts[prompts == config.mask_id] = config.eos_id
    with options.refused_in_words():
        plan_generate(config, list(prompts), arguments.gen_length, arguments.block_length)
    device = options.device_of(arguments.device, dtype)
    if arguments.cuda_graph:
        options.check_graph(device, arguments.caches)
    with options.refused_in_words():
        if arguments.model is None:
            model = random_model(config, arguments.seed, dtype, device)
        else:
            model = load_model(arguments.model, dtype, device)
        rows, same_tokens = measure(model, prompts, arguments)

    what = "random weights" if arguments.model is None else str(arguments.model)
    print_table(
        f"A step of {arguments.batch} x {arguments.block_length} positions, {what}, {config.num_layers} layers, hidden "
        f"{config.hidden}, vocabulary {config.vocab_size}, {arguments.dtype}, {options.device_name(device)}",
        ("cache, policy", "steps", "model ms", "selector ms", "selector share", "tokens/s"),
        [
            (
                f"{row.cache}, {row.policy}", str(row.steps), f"{row.model_ms:.3f}", f"{row.selector_ms:.4f}",
                f"{row.selector_share:.2%}", f"{row.tokens_per_s:.1f}",
            )
            for row in rows
        ],
    )  # fmt: skip
    if PUBLISHED in {row.policy for row in rows}:
        said = {cache: "the same" if same else "other" for cache, same in same_tokens.items()}
        console().print(
            "published: local_leap as the published code selects, position by position in Python over float64 rows; it "
            "was given the rows of masked positions only, where that code computes all rows of the sequence.\n"
            f"Its tokens against local_leap's: {', '.join(f'{cache}: {word}' for cache, word in said.items())}."
        )
    report: dict[str, Any] = {
        "device": options.device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dtype": arguments.dtype,
        "model": None if arguments.model is None else str(arguments.model),
        "preset": arguments.preset if arguments.model is None else None,
        "config": vars(config),
        "batch": arguments.batch,
        "prompt_length": arguments.prompt_length,
        "gen_length": arguments.gen_length,
        "block_length": arguments.block_length,
        "cuda_graph": arguments.cuda_graph,
        "published_has_same_tokens": same_tokens,
        "rows": [vars(row) | {"tokens_per_s": row.tokens_per_s} for row in rows],
    }
    write_json(arguments.json, report)


def measure(model: DiffusionModel, prompts: Tensor, arguments: argparse.Namespace) -> tuple[list[Row], dict[str, bool]]:
    """The rows, and for each cache whether the published selector decoded to the tokens of local_leap."""
    given = {"gen_length": arguments.gen_length, "block_length": arguments.block_length}
    names = [*arguments.policies, *([] if arguments.no_published else [PUBLISHED])]
    rows, same_tokens = [], {}
    with progress() as bar:
        task = bar.add_task("decoding", total=len(arguments.caches) * len(names))
        for cache in arguments.caches:
            graph = arguments.cuda_graph and cache == "dual"
            found: dict[str, Generation] = {}
            # The first block of each cache warms up what loads and allocates at its first call.
            first = {"gen_length": arguments.block_length, "block_length": arguments.block_length}
            generate(model, list(prompts), cache=cache, cuda_graph=graph, threshold=0.0, **first)
            for name in names:
                selector = (
                    {"selector": published_selector} if name == PUBLISHED else {"cuda_graph": graph, "policy": name}
                )
                begin_s = perf_counter()
                found[name] = generate(model, list(prompts), cache=cache, **selector, **given)
                wall_s = perf_counter() - begin_s
                steps = found[name].steps
                rows.append(
                    Row(
                        cache, name, steps, arguments.batch * arguments.gen_length,
                        found[name].model_s / steps * 1e3, found[name].selector_s / steps * 1e3, wall_s,
                    )
                )  # fmt: skip
                bar.advance(task)
            if {"local_leap", PUBLISHED} <= set(found):
                same_tokens[cache] = all(map(torch.equal, found["local_leap"].tokens, found[PUBLISHED].tokens))
    return rows, same_tokens
