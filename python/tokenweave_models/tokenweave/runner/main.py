"""The runner: `torchrun --nproc-per-node=N -m tokenweave_models.tokenweave generate|prefill-bench|serve-bench`.

One rank needs no torchrun. However a run ends, all of its ranks end: rank 0 says what a user can put right; a rank that
saw another fail or vanish says which.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Sequence

import torch
import torch.distributed as dist

from tokenweave_models.common.errors import UserError
from tokenweave_models.tokenweave.demo import why_not
from tokenweave_models.tokenweave.runner import generate, prefill_bench, serve_bench
from tokenweave_models.tokenweave.runner.options import DTYPES
from tokenweave_models.tokenweave.runner.ranks import Ranks, rank_of_environment
from tokenweave_models.tokenweave.runner.reporting import Reporter
from tokenweave_ops import CommunicationError

COMMANDS = {
    "generate": (generate, "text that goes on from prompts"),
    "prefill-bench": (prefill_bench, "latency of prompts by mode and number of tokens"),
    "serve-bench": (serve_bench, "throughput and latency of a stream of requests by mode"),
}
# A failure reaches all ranks within this time, unless they wait in C++; each may then say its own view of it.
LAST_WORDS_S = 0.3
PEER_GRACE_S = 1.0  # for the system to tell of a process that has ended


def parse(argv: Sequence[str] | None, is_first: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tokenweave_models.tokenweave", description="Run a decoder on several ranks: reference, fused or woven."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        module.add_arguments(command)
    if is_first:
        return parser.parse_args(argv)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        return parser.parse_args(argv)


def device_type_of(name: str, dtype: torch.dtype) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; `tokenweave info` says more")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if (reason := why_not(torch.device(name), dtype)) is not None:
        raise UserError(f"the compiled ops do not run on {name}: {reason}")
    return name


def main(argv: Sequence[str] | None = None) -> int:
    is_first = rank_of_environment() == 0
    arguments = parse(argv, is_first)
    ranks: Ranks | None = None
    try:
        ranks = Ranks(device_type_of(arguments.device, DTYPES[arguments.dtype]), arguments.timeout_s)
        COMMANDS[arguments.command][0].run(arguments, ranks, Reporter(is_first))
        ranks.close()
        return 0
    except UserError as error:
        return leave(ranks, 1, f"tokenweave: {error}" if is_first else None)
    except KeyboardInterrupt:
        return leave(ranks, 130, "tokenweave: interrupted" if is_first else None)
    except Exception as error:
        return leave(ranks, 1, sentence_of(error, ranks))


def sentence_of(error: Exception, ranks: Ranks | None) -> str:
    """What to print: a sentence if ranks failed each other, else, for a fault of this program, the traceback."""
    rank = f"tokenweave: rank {rank_of_environment()}"
    if isinstance(error, CommunicationError):
        return f"{rank}: {type(error).__name__}: {error}"
    if ranks is not None and ranks.watch is not None and (lost := ranks.watch.lost(PEER_GRACE_S)) is not None:
        return f"{rank}: {lost}"
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return f"{rank}: CommunicationError: {str(error).splitlines()[0]}"
    return f"{rank}: " + traceback.format_exc()


def leave(ranks: Ranks | None, status: int, sentence: str | None) -> int:
    """Ends this rank. With peers at once: what is left of the group may wait for ranks that are gone."""
    if ranks is None or ranks.watch is None:
        if sentence is not None:
            print(sentence, file=sys.stderr)
        return status
    ranks.watch.say(sentence)
    time.sleep(LAST_WORDS_S)
    sys.stdout.flush()
    os._exit(status)
