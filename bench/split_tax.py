#!/usr/bin/env python3
"""What splitting a batch costs its GEMMs on one device, and what a collective beside them takes.

    python bench/split_tax.py                                     the published sizes on the GPU, small ones on a CPU
    python bench/split_tax.py --json split_tax.json               kept, for bench/split_report.py FILE -o out.png
    python bench/split_tax.py --part tax --tokens 1024,2048       one part, some sizes
    python bench/split_tax.py --profile build/profile.json        planned with what `tokenweave calibrate` measured here
    python bench/split_tax.py --device cpu --quick                shows that it works, in seconds

Exits with 1 if a result is wrong, and such a row prints no speed, or if a part cannot run here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent
# At the end: an installed tokenweave_ops must win over the source tree, which may hold no built library.
sys.path.append(str(BENCH.parent))

import torch  # noqa: E402

from bench import environment, gemm_beside, machines, split_gemms, split_report, timing  # noqa: E402
from bench.harness import DTYPE_NAME  # noqa: E402
from bench.split_gemms import PUBLISHED_SIZES, PUBLISHED_TOKENS, MlpSizes  # noqa: E402
from bench.terminal import Terminal  # noqa: E402

BUDGET_S = {False: 3.0, True: 0.6}  # of timing per row; quick or not
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# A CPU shows that everything works; its GEMMs have no waves that a split could fill better.
SIZES = {
    "cuda": (PUBLISHED_SIZES, PUBLISHED_TOKENS, (1024, 3840)),
    "cpu": (MlpSizes(1024, 448), (1024, 1536, 2048), (1024,)),
}
QUICK_SIZES = {
    "cuda": (PUBLISHED_SIZES, (1280, 2048), (2048,)),
    "cpu": (MlpSizes(256, 112), (1024,), (256,)),
}


def _tokens(text: str) -> tuple[int, ...]:
    try:
        tokens = tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers, as in 1024,2048, got {text!r}") from None
    for count in tokens:
        if not split_gemms.searched_splits(count):
            wanted = f"a multiple of {split_gemms.STEP} with {split_gemms.MIN_HALF_PCT} % of them in either half"
            raise argparse.ArgumentTypeError(f"{count} tokens have no split at {wanted}")
    return tokens


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if a GPU is visible")
    parser.add_argument("--part", choices=["tax", "beside"], help="only this: the split tax, or the GEMMs beside")
    parser.add_argument("--tokens", type=_tokens, metavar="T,T,...", help="sizes of the batch, instead of the usual")
    parser.add_argument("--hidden", type=int, help="default: 8192 on a GPU")
    parser.add_argument("--intermediate", type=int, help="per rank; default: 3584 on a GPU")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="the planner's rates; default: built in")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--quick", action="store_true", help="a few sizes, short timing")
    return parser.parse_args(arguments)


def sizes_of(options: argparse.Namespace, device: str) -> tuple[MlpSizes, tuple[int, ...], tuple[int, ...]]:
    sizes, tax_tokens, beside_tokens = (QUICK_SIZES if options.quick else SIZES)[device]
    sizes = MlpSizes(
        options.hidden or sizes.hidden, options.intermediate or sizes.intermediate, DTYPES[options.dtype]
    )  # fmt: skip
    if sizes.hidden < 8 or sizes.hidden % 8 or sizes.hidden > 16384 or sizes.intermediate < 1:
        raise SystemExit(
            "split_tax.py: hidden must be a multiple of 8 from 8 to 16384 and intermediate positive, got "
            f"{sizes.hidden} and {sizes.intermediate}"
        )
    return sizes, options.tokens or tax_tokens, options.tokens or beside_tokens


def measure_beside(doc: dict, sizes: MlpSizes, tokens, machine, budget_s: float, advance) -> None:
    """Fills `collective` and `beside` of the document."""
    # Llama-3.3-70B's attention on one of 8 ranks at the published sizes: 8 query heads, 1 key and 1 value head of 128.
    gemms = gemm_beside.gemms_of(sizes, qkv_features=10 * sizes.hidden // 64, attention_features=sizes.hidden // 8)
    collective = gemm_beside.Collective(machine, min(1024, tokens[0]), sizes.hidden, sizes.dtype)
    num_threads = torch.get_num_threads()
    try:
        if machine.kind == "cpu":
            torch.set_num_threads(max(1, num_threads - 1))  # a core for the collective, also while it rests
        lanes = gemm_beside.lanes_of(machine)
        doc["collective"], works = gemm_beside.measure_collective(collective, lanes, budget_s)
        for name, shape in gemms.items() if works else ():
            for num_tokens in tokens:
                advance(f"{name}, {num_tokens} tokens, beside a collective")
                doc["beside"].append(gemm_beside.measure_beside(
                    name, shape, num_tokens, sizes.dtype, works, collective.call_bytes, machine, lanes, budget_s
                ))  # fmt: skip
    finally:
        torch.set_num_threads(num_threads)
        collective.close()


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("split_tax.py: --device cuda, but torch sees no GPU; run with --device cpu")
    sizes, tax_tokens, beside_tokens = sizes_of(options, device)
    try:
        hardware = split_gemms.hardware_profile(device, options.profile)
    except (OSError, ValueError) as error:
        raise SystemExit(f"split_tax.py: --profile: {error}") from None
    terminal, monitor = Terminal(), environment.GpuMonitor() if device == "cuda" else None
    cache_bytes = int(os.environ.get("TOKENWEAVE_BENCH_CACHE_BYTES", "0")) or None  # None: what the machine reports
    machine = {"cpu": machines.CpuMachine, "cuda": machines.CudaMachine}[device](cache_bytes)
    others, budget_s = environment.OtherLoad(), BUDGET_S[options.quick]
    known = {(features, inner) for features, inner, _, _ in hardware.gemm_samples}
    source = "measured times of these GEMMs" if known.issuperset(sizes.gemms) else "the wave model of GEMMs"
    doc = {
        "schema": split_report.SCHEMA, "version": split_report.VERSION, "env": environment.describe(device, monitor),
        "profile": f"{hardware.name} ({hardware.device}), {source}",
        "sizes": {"hidden": sizes.hidden, "intermediate": sizes.intermediate, "dtype": DTYPE_NAME[sizes.dtype]},
        "tax": [], "collective": None, "beside": [], "skipped": {}, "note": gemm_beside.SEE_NOT,
    }  # fmt: skip
    parts = [options.part] if options.part else ["tax", "beside"]
    steps = len(tax_tokens) * ("tax" in parts) + 4 * len(beside_tokens) * ("beside" in parts)
    with terminal.progress(steps) as advance, torch.no_grad():
        for num_tokens in tax_tokens if "tax" in parts else ():
            advance(f"split tax, {num_tokens} tokens")
            row = split_gemms.measure_tax(num_tokens, sizes, hardware, machine, budget_s, monitor)
            doc["tax"].append(row)
            if not terminal.is_live:  # no bar: a line per row, so that a log shows life
                terminal.print("split tax " + " ".join(split_report.tax_cells(row, published=False)[:10]))
        if "beside" in parts:
            try:
                measure_beside(doc, sizes, beside_tokens, machine, budget_s, advance)
            except RuntimeError as error:  # must not take the split tax with it
                doc["skipped"]["the rest of the GEMMs beside a collective"] = timing.first_line(error)
    doc["env"]["other_load"] = others.share()
    if monitor:
        doc["env"]["clocks_after"] = monitor.snapshot()
    split_report.validate(doc)
    split_report.print_tables(doc, terminal)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(doc, indent=1) + "\n")
        terminal.print(f"written: {options.json}")
    alone = doc["collective"]["alone"] if doc["collective"] else []
    return 0 if all(row["ok"] for row in [*doc["tax"], *doc["beside"], *alone]) and not doc["skipped"] else 1


if __name__ == "__main__":
    sys.exit(main())
