"""What the runner's commands have in common: arguments, the device, files, and errors as sentences."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from tokenweave_models.common.arguments import positive
from tokenweave_models.common.console import console
from tokenweave_models.common.errors import UserError
from tokenweave_ops import DecodeRequests, decode_step_

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


def at_least_0(text: str) -> float:
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def whole_at_least_0(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def add_device(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")


def add_lengths(parser: argparse._ArgumentGroup, gen_length: int) -> None:
    parser.add_argument(
        "--gen-length", type=positive, default=gen_length, metavar="N", help="new tokens, a multiple of the block"
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


@contextmanager
def refused_in_words() -> Iterator[None]:
    """What refuses an argument of the command line says why; that is all the user has to see."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def check_output(path: Path | None) -> None:
    """Whether a file can be written there is asked before a long run, not after it."""
    if path is None:
        return
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    if is_new:
        path.unlink()


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    console().print(f"Written: {path}", markup=False)
