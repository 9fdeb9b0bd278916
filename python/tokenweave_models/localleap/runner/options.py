"""What the runner's commands have in common: arguments, the device, files, and errors as sentences."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from tokenweave_models.common.arguments import MOST, positive
from tokenweave_models.common.errors import UserError
from tokenweave_ops import DecodeRequests, decode_step_

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def fp32(text: str) -> float:
    value = float(text)
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise argparse.ArgumentTypeError(f"must be a finite fp32 number, got {text}")
    return value


def temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1e30:
        raise argparse.ArgumentTypeError(f"must be 0 to 1e30, got {text}")
    return value


def whole_at_least_0(text: str) -> int:
    value = int(text)
    if not 0 <= value <= MOST:
        raise argparse.ArgumentTypeError(f"must be at least 0 and at most {MOST}, got {text}")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**62:  # those of further prompts count on
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 2^62, got {text}")
    return value


def add_device(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")


def add_lengths(parser: argparse._ArgumentGroup, gen_length: int) -> None:
    parser.add_argument(
        "--gen-length", type=positive, metavar="N", help=f"new tokens, a multiple of the block; not given: {gen_length}"
    )
    parser.add_argument(
        "--block-length", type=positive, default=32, metavar="N", help="tokens that are decoded together, up to 1024"
    )
    parser.add_argument("--cuda-graph", action="store_true", help="replay passes over blocks; GPU and dual cache only")


def device_of(name: str, dtype: torch.dtype = torch.float32) -> torch.device:
    """The device asked for, if there is one on which decode_step_ runs."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; `tokenweave info` says more")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    requests = DecodeRequests.make(1, 1, device=name)
    tokens = torch.zeros(1, 1, dtype=torch.int64, device=name)
    try:
        decode_step_(torch.zeros(1, 1, 2, dtype=dtype, device=name), tokens, requests, mask_id=0)
    except (RuntimeError, ImportError) as error:
        raise UserError(f"the compiled ops do not run on {name}: {error}") from error
    return torch.device(name)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def refuse_unused(arguments: argparse.Namespace, why: str, *names: str) -> None:
    """Arguments that would be ignored: what the user meant by them would not happen."""
    for name in names:
        if getattr(arguments, name) not in (None, False):
            raise UserError(f"--{name.replace('_', '-')} has no use {why}")


def check_graph(device: torch.device, caches: Sequence[str]) -> None:
    if device.type != "cuda" or "dual" not in caches:
        raise UserError(f"--cuda-graph needs a GPU and --cache dual, got {device.type} and {', '.join(caches)}")


@contextmanager
def refused_in_words() -> Iterator[None]:
    """What refuses an argument of the command line says why; that is all the user has to see."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise UserError(f"the device's memory is too small for this: {error}") from error
    except RuntimeError as error:
        if not str(error).startswith(("decode_step_:", "generate:")):
            raise
        raise UserError(str(error)) from error
