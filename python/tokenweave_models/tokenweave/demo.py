"""`tokenweave demo`: one decoder on real text, eager against fused, in one process and tensor-parallel; then the bench.

The weights are random, so the text is not continued sensibly; what is compared is arithmetic and time. A float64 run of
the same weights says which form is closer to the truth.
"""

import argparse
import copy
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenweave_ops
from tokenweave_models.common.arguments import positive
from tokenweave_models.common.console import console, print_table, progress
from tokenweave_models.common.corpus import find_checkout, project_text
from tokenweave_models.common.errors import UserError
from tokenweave_models.common.tokenizer import ByteTokenizer
from tokenweave_models.tokenweave import demo_ranks
from tokenweave_models.tokenweave.config import ModelConfig
from tokenweave_models.tokenweave.executor import Executor
from tokenweave_models.tokenweave.model import Decoder, random_decoder
from tokenweave_models.tokenweave.passes import prefill_executor, prefill_logits, timed_prefill
from tokenweave_models.tokenweave.reduction import EagerAddition, FusedAddition

MODES = {"reference": EagerAddition, "fused": FusedAddition}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WARM_UP_PASSES = 1
# Passes stop early on a slow machine, once each mode has a median worth the name.
MIN_PASSES = 3
PASSES_BUDGET_S = 20.0


@dataclass(frozen=True)
class ModeResult:
    layer_ms: float  # the whole pass divided by the number of layers
    norms_ms: float  # what of it is spent in additions and norms
    max_error: float  # of the logits, against the float64 run
    cross_entropy: float  # of the next byte, in nats
    passes: int


@dataclass(frozen=True)
class Comparison:
    modes: dict[str, ModeResult]
    max_difference: float  # between the two modes' logits
    logit_std: float
    same_next_byte: float  # share of positions where both modes predict the same byte
    float64_cross_entropy: float


def cross_entropy(logits: Tensor, targets: Tensor) -> float:
    return F.cross_entropy(logits.double().flatten(0, 1), targets.flatten()).item()


@torch.inference_mode()
def compare_modes(
    model: Decoder, tokens: Tensor, targets: Tensor, passes: int
) -> tuple[Comparison, dict[str, Tensor], Tensor]:
    """Runs every mode, and the float64 model once, over the same tokens; times the modes in turn, pass by pass.

    Returns what came out, the logits by mode, and those of the float64 run.
    """
    num_layers = model.config.num_layers

    def executor(model: Decoder, reduction: type[EagerAddition | FusedAddition]) -> Executor:
        weight = model.norm.weight
        return prefill_executor(
            model, tokens, reduction(tokens.numel(), model.config.hidden, weight.dtype, weight.device)
        )  # fmt: skip

    with progress() as bar:
        task = bar.add_task("float64 run of the same weights", total=1)
        truth = prefill_logits(executor(copy.deepcopy(model).double(), EagerAddition), tokens)
        bar.advance(task)

        executors = {name: executor(model, reduction) for name, reduction in MODES.items()}
        task = bar.add_task("warm-up", total=WARM_UP_PASSES * len(MODES))
        logits = {}
        for _ in range(WARM_UP_PASSES):
            for name in MODES:
                logits[name] = prefill_logits(executors[name], tokens)
                bar.advance(task)

        task = bar.add_task("timed passes, modes in turn", total=passes * len(MODES))
        timings: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in MODES}
        deadline_s = perf_counter() + PASSES_BUDGET_S
        for done in range(passes):
            if done >= MIN_PASSES and perf_counter() > deadline_s:
                break
            for name in MODES:
                timings[name].append(timed_prefill(executors[name], tokens))
                bar.advance(task)
        bar.update(task, total=sum(map(len, timings.values())))

    eager, fused = logits["reference"], logits["fused"]
    comparison = Comparison(
        modes={
            name: ModeResult(
                layer_ms=median(whole for whole, _ in timings[name]) / num_layers,
                norms_ms=median(sum(norms) for _, norms in timings[name]) / num_layers,
                max_error=(logits[name].double() - truth).abs().max().item(),
                cross_entropy=cross_entropy(logits[name], targets),
                passes=len(timings[name]),
            )
            for name in MODES
        },
        max_difference=(eager.double() - fused.double()).abs().max().item(),
        logit_std=truth.std().item(),
        same_next_byte=(eager.argmax(-1) == fused.argmax(-1)).double().mean().item(),
        float64_cross_entropy=cross_entropy(truth, targets),
    )
    return comparison, logits, truth


def print_comparison(result: Comparison, config: ModelConfig, tokens: Tensor, dtype: str) -> None:
    labels = {"reference": "eager add + norm", "fused": "add_rms_norm_"}
    print_table(
        f"One decoder, {config.num_layers} layers, hidden {config.hidden}, {tokens.numel()} tokens, {dtype}, "
        f"{tokens.device.type}",
        ("", "ms / layer", "of it add + norm", "error of logits", "cross-entropy"),
        [
            (labels[name], f"{m.layer_ms:.3f}", f"{m.norms_ms:.3f}", f"{m.max_error:.2e}", f"{m.cross_entropy:.4f}")
            for name, m in result.modes.items()
        ],
    )
    eager, fused = result.modes["reference"], result.modes["fused"]
    console().print(
        f"Times are medians over {eager.passes} passes of each, taken in turn; a layer has two additions with a norm.\n"
        f"Eager time over ours: {eager.norms_ms / fused.norms_ms:.2f} for add + norm, "
        f"{eager.layer_ms / fused.layer_ms:.2f} for the whole layer.\n"
        f"Logits: at most {result.max_difference:.2e} apart (their standard deviation is {result.logit_std:.2f}); "
        f"same next byte at {result.same_next_byte:.1%} of positions.\n"
        f"The error is the largest distance to a float64 run of the same weights, whose cross-entropy is "
        f"{result.float64_cross_entropy:.4f} nats.\n"
        f"Weights are random, so this is near the ln(256) = {log(256):.4f} of a uniform guess."
    )


def next_byte_task(stream: Tensor, batch: int, seq: int) -> tuple[Tensor, Tensor]:
    """(tokens, targets), each [batch, seq], from the start of the stream: a target is the token that follows."""
    wanted = batch * seq + 1
    stream = stream.repeat(-(-wanted // stream.numel()))[:wanted]
    return stream[:-1].view(batch, seq), stream[1:].view(batch, seq)


def run_bench(checkout: Path, device: torch.device, output: Path) -> None:
    """This machine's bench table and plot, by the same commands one would type."""
    results, plot = output / "bench.json", output / "bench.png"
    commands = (
        ("bench/run.py", "--quick", "--device", device.type, "--json", str(results)),
        ("bench/plot.py", str(results), "--output", str(plot)),
    )
    for command in commands:
        console().print(f"\n$ python {' '.join(command)}", style="bold")
        done = subprocess.run((sys.executable, *command), cwd=checkout)
        if done.returncode != 0:
            raise UserError(f"{command[0]} ended with exit status {done.returncode}; its message is above")
    console().print(f"\nBench plot: {plot}")


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the op cannot run here, in one sentence, before anything slow is started; None if it can."""
    x, weight = torch.ones(1, 8, dtype=dtype, device=device), torch.ones(8, dtype=dtype, device=device)
    try:
        tokenweave_ops.rms_norm(x, weight)
    except (RuntimeError, ImportError) as error:
        return str(error)
    return None


def choose_device(name: str, dtype: torch.dtype) -> torch.device:
    """The device asked for; `auto` is the GPU if there is one that the ops run on."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; `tokenweave info` says more")
    if name == "auto" and torch.cuda.is_available():
        reason = why_not(torch.device("cuda"), dtype)
        if reason is None:
            return torch.device("cuda")
        console().print(f"There is a GPU, but the ops do not run on it, so this runs on the CPU: {reason}")
    device = torch.device("cpu" if name == "auto" else name)
    reason = why_not(device, dtype)
    if reason is not None:
        raise UserError(f"the compiled ops do not run on {device.type}: {reason}")
    return device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = ModelConfig()
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--hidden", type=positive, default=default.hidden)
    parser.add_argument("--layers", type=positive, default=default.num_layers)
    parser.add_argument("--heads", type=positive, default=default.num_heads)
    parser.add_argument("--kv-heads", type=positive, default=default.num_kv_heads)
    parser.add_argument("--batch", type=positive, default=2, help="sequences")
    parser.add_argument("--seq", type=positive, default=512, help="bytes of text per sequence")
    parser.add_argument(
        "--ranks", type=positive, default=2, help="processes of the tensor-parallel run; 1 leaves it out"
    )
    parser.add_argument("--passes", type=positive, default=15, help="timed passes of each mode")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--no-bench", action="store_true", help="stop after the model")
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder for JSON files and the plot")


def run(arguments: argparse.Namespace) -> None:
    dtype, ranks = DTYPES[arguments.dtype], arguments.ranks
    try:
        config = ModelConfig(
            hidden=arguments.hidden,
            intermediate=-(-arguments.hidden * 11 // (4 * ranks)) * ranks,  # 11/4 of hidden, divisible by ranks
            num_layers=arguments.layers,
            num_heads=arguments.heads,
            num_kv_heads=arguments.kv_heads,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    device = choose_device(arguments.device, dtype)
    no_ranks = demo_ranks.why_not(ranks, device)
    if no_ranks is None:
        demo_ranks.check(config, ranks, dtype)
    output = arguments.output.resolve()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {arguments.output}: cannot make this folder: {error.strerror}") from error

    checkout = find_checkout()
    text, source = project_text(checkout)
    stream = ByteTokenizer().encode(text)
    wanted = arguments.batch * arguments.seq + 1
    console().print(f"Text: {source}, {stream.numel()} bytes, the first {wanted} are used.")
    if stream.numel() < wanted:
        console().print("The text is shorter than that and is repeated.")
    tokens, targets = (t.to(device) for t in next_byte_task(stream, arguments.batch, arguments.seq))

    model = random_decoder(config, arguments.seed).to(dtype).to(device)
    result, logits, truth = compare_modes(model, tokens, targets, arguments.passes)
    print_comparison(result, config, tokens, arguments.dtype)
    report = {"config": asdict(config), "dtype": arguments.dtype, "device": device.type, "tokens": tokens.numel()}
    (output / "model.json").write_text(json.dumps(report | asdict(result), indent=1) + "\n", encoding="utf-8")

    console().print()
    if no_ranks is None:
        fused = result.modes["fused"]
        one_process = demo_ranks.Row("1 process, add_rms_norm_", fused.layer_ms, fused.norms_ms, logits["fused"])
        no_ranks = demo_ranks.run(arguments, config, dtype, tokens, one_process, truth, output / "tensor_parallel.json")
    if no_ranks is not None:
        console().print(f"No tensor-parallel run: {no_ranks}")

    if arguments.no_bench:
        return
    if checkout is None:
        console().print("\nThe bench is in the source checkout (bench/run.py); run the demo there to see its table.")
        return
    run_bench(checkout, device, output)
