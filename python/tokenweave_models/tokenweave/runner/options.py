"""What all commands of the runner have in common: their arguments, and the model, link, planner and session of them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from tokenweave_models.common.arguments import positive
from tokenweave_models.common.errors import UserError
from tokenweave_models.tokenweave.calibration.profiles import profile_of
from tokenweave_models.tokenweave.checkpoint import load_config, load_decoder
from tokenweave_models.tokenweave.config import ModelConfig
from tokenweave_models.tokenweave.model import Decoder
from tokenweave_models.tokenweave.runner.planning import Planner, shape_of
from tokenweave_models.tokenweave.runner.random_weights import random_share
from tokenweave_models.tokenweave.runner.ranks import Ranks
from tokenweave_models.tokenweave.runner.reporting import Reporter
from tokenweave_models.tokenweave.runner.session import MODES, Session
from tokenweave_models.tokenweave.tensor_parallel import Part, parts_of
from tokenweave_ops import EmulatedLink

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANDOM_MAX_LEN = 1 << 20  # positions of a random model: whatever a benchmark asks for


@contextmanager
def refused_in_words() -> Iterator[None]:
    """What refuses an argument of the command line says why; that is all the user has to see."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def positive_number(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def split_choice(text: str) -> str | int:
    return text if text in ("auto", "none", "half") else positive(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, metavar="FOLDER", help="a Hugging Face folder: Llama, Qwen2 or Mixtral")
    model.add_argument(
        "--random", action="store_true", help="random weights, of the shape of --model or of the sizes that follow"
    )
    default = ModelConfig()
    model.add_argument("--vocab", type=positive, default=default.vocab_size)
    model.add_argument("--hidden", type=positive, default=default.hidden)
    model.add_argument("--intermediate", type=positive, default=default.intermediate)
    model.add_argument("--layers", type=positive, default=default.num_layers)
    model.add_argument("--heads", type=positive, default=default.num_heads)
    model.add_argument("--kv-heads", type=positive, default=default.num_kv_heads)
    model.add_argument("--experts", type=int, default=0, help="of a mixture; 0: a dense MLP")
    model.add_argument("--experts-per-token", type=int, default=2)
    model.add_argument("--weights-seed", type=int, default=0, help="of random weights")
    model.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")

    run = parser.add_argument_group("run")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    run.add_argument(
        "--split", type=split_choice, default="auto", metavar="auto|none|half|N",
        help="of weave: auto asks the planner, N is the number of tokens in the first half",
    )  # fmt: skip
    run.add_argument("--profile", type=Path, metavar="FILE", help="what the planner knows of this device (calibrate)")
    run.add_argument("--timeout-s", type=positive_number, default=60.0, help="no rank waits longer for another")
    link = parser.add_argument_group("emulated link", "CPU ranks only; what is measured with one is an emulation")
    link.add_argument("--link-gb-s", type=positive_number, metavar="GB/S", help="what a rank sends, and receives")
    link.add_argument("--link-us", type=float, default=0.0, metavar="US", help="latency of a call")


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    bench = parser.add_argument_group("bench")
    bench.add_argument("--modes", type=modes, default=MODES, metavar=",".join(MODES), help="which to compare")
    bench.add_argument("--seed", type=int, default=0, help="of the tokens")
    bench.add_argument("--json", type=Path, metavar="FILE")
    bench.add_argument("--png", type=Path, metavar="FILE")


def check_outputs(*paths: Path | None) -> None:
    """Whether files can be written there is asked before a long run, not after it."""
    for path in filter(None, paths):
        is_new = not path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
        if is_new:
            path.unlink()


def modes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(MODES) or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(MODES)}, got {text}")
    return names


def config_of(arguments: argparse.Namespace) -> ModelConfig:
    if arguments.model is not None:
        return load_config(arguments.model)
    if not arguments.random:
        raise UserError("--model FOLDER is missing; --random takes random weights instead")
    with refused_in_words():
        return ModelConfig(
            vocab_size=arguments.vocab,
            hidden=arguments.hidden,
            intermediate=arguments.intermediate,
            num_layers=arguments.layers,
            num_heads=arguments.heads,
            num_kv_heads=arguments.kv_heads,
            num_experts=arguments.experts,
            experts_per_token=arguments.experts_per_token if arguments.experts else 0,
            max_len=RANDOM_MAX_LEN,
        )


def check_len(config: ModelConfig, needed: int) -> None:
    if needed > config.max_len:
        raise UserError(f"the model has {config.max_len} positions, and {needed} tokens per request were asked for")


def load_model(arguments: argparse.Namespace, config: ModelConfig, ranks: Ranks, reporter: Reporter) -> Decoder:
    """This rank's share, with progress."""
    with refused_in_words():
        config.check_world_size(ranks.world_size)
    dtype = DTYPES[arguments.dtype]
    with reporter.progress() as bar:
        total = sum(1 for _ in parts_of(config, ranks.rank, ranks.world_size))
        task = bar.add_task("weights", total=total)

        def on_part(_part: Part) -> None:
            bar.advance(task)

        def load() -> Decoder:
            if not arguments.random:
                return load_decoder(
                    arguments.model, ranks.rank, ranks.world_size, dtype=dtype, device=ranks.device, on_part=on_part
                )
            return random_share(
                config, ranks.rank, ranks.world_size, arguments.weights_seed,
                dtype=dtype, device=ranks.device, on_part=on_part,
            )  # fmt: skip

        return ranks.attempt(load, is_loading=True)


def link_of(arguments: argparse.Namespace, ranks: Ranks) -> EmulatedLink | None:
    if arguments.link_gb_s is None:
        if arguments.link_us:
            raise UserError("--link-us needs --link-gb-s: both describe the emulated link")
        return None
    if ranks.device.type != "cpu" or ranks.world_size == 1:
        raise UserError("--link-gb-s: only CPU ranks, two or more, can have an emulated link")
    with refused_in_words():
        return EmulatedLink(arguments.link_gb_s, arguments.link_us)


def make_session(
    arguments: argparse.Namespace,
    ranks: Ranks,
    reporter: Reporter,
    config: ModelConfig,
    modes: Sequence[str],
    *,
    max_tokens: int,
    num_slots: int,
    max_len: int,
    launch: str = "eager",
) -> Session:
    """Everything that can be refused is refused before weights are loaded."""
    check_len(config, max_len)
    link = link_of(arguments, ranks)
    dtype = DTYPES[arguments.dtype]
    with refused_in_words():
        config.check_world_size(ranks.world_size)
        shape = shape_of(config, dtype.itemsize)
    hardware = ranks.attempt(lambda: profile_of(ranks.device, arguments.profile, link))
    planner = Planner(shape, ranks.world_size, hardware, arguments.split, launch)
    model = load_model(arguments, config, ranks, reporter)
    return ranks.attempt(
        lambda: Session(
            ranks, model, planner, modes,
            max_tokens=max_tokens, num_slots=num_slots, max_len=max_len, link=link, timeout_s=arguments.timeout_s,
        )
    )  # fmt: skip


def facts_of(arguments: argparse.Namespace, ranks: Ranks, config: ModelConfig, session: Session) -> dict:
    """What a report says about how it was made."""
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
    return {
        "command": arguments.command,
        "device": device,
        "world_size": ranks.world_size,
        "threads_per_rank": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "torch": torch.__version__,
        "model": None if arguments.model is None else str(arguments.model),
        "random_weights": arguments.random,
        "config": {name: value for name, value in vars(config).items() if isinstance(value, (int, float))},
        "emulated_link": None
        if session.link is None
        else {"gigabytes_per_s": session.link.gigabytes_per_s, "latency_us": session.link.latency_us},
        "split": arguments.split,
    }


def setting_of(arguments: argparse.Namespace, ranks: Ranks, config: ModelConfig, session: Session) -> str:
    """The same for the title of a table or picture."""
    what = f"{config.num_layers} layers, hidden {config.hidden}, {arguments.dtype}"
    where = f"{ranks.world_size} rank{'s' * (ranks.world_size > 1)} on {ranks.device.type}"
    return ", ".join((what, where, *([str(session.link)] if session.link else ())))
