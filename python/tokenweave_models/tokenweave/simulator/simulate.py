"""`tokenweave simulate`: predicted latencies of a model on GPUs that are not here, and the schedule behind them.

Every number it prints is a simulation: predictions of the planner's cost model, next to what TokenWeave's authors
published where they did. docs/planner.md describes the model and its errors.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

from tokenweave_models.common.arguments import positive
from tokenweave_models.common.console import console, print_table
from tokenweave_models.common.errors import UserError
from tokenweave_models.tokenweave.simulator import fitting, published
from tokenweave_models.tokenweave.simulator.model_shapes import MODEL_SHAPES
from tokenweave_models.tokenweave.simulator.plot import draw
from tokenweave_models.tokenweave.simulator.replay import Span, replay, weave_tasks
from tokenweave_ops import H100, HardwareProfile, SplitPlan, load_overrides, plan_token_split, weave_pass

MODES = ("reference", "fused", "weave", "no_communication")
BUILT_IN = {"h100": H100}
# Of a pass in steady state; the first and the last layer are not.
DRAWN_LAYERS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=tuple(MODEL_SHAPES), default="llama-3.3-70b")
    parser.add_argument("--gpus", type=positive, default=8, help="ranks of the tensor-parallel group")
    parser.add_argument("--gpu", default="h100", help="h100, or a profile file that `tokenweave calibrate` wrote")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[1024, 2048, 4096, 8192], metavar="N")
    parser.add_argument("--context", type=int, default=0, help="tokens that are in the KV cache before")
    parser.add_argument("--launch", choices=("graph", "eager"), default="graph", help="what the host costs")
    parser.add_argument(
        "--overrides", metavar="FILE", help="JSON table of splits; `published` for the authors' own, tuned for 8 H100"
    )
    parser.add_argument(
        "--check", action="store_true", help="refit the constants and compare with everything that was published"
    )
    parser.add_argument(
        "--sensitivity", action="store_true", help="the errors under other assumptions, each time with a new fit"
    )
    parser.add_argument("--output", type=Path, default=Path("build/simulate"), help="folder for JSON and PNG")


def load_profile(name: str) -> HardwareProfile:
    if name in BUILT_IN:
        return BUILT_IN[name]
    try:
        return HardwareProfile.load(name)
    except OSError as error:
        known = ", ".join(BUILT_IN)
        raise UserError(f"--gpu {name}: neither a built-in profile ({known}) nor a file: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--gpu {error}") from error


def make_plans(arguments: argparse.Namespace, profile: HardwareProfile) -> list[SplitPlan]:
    try:
        overrides = None
        if arguments.overrides == "published":
            overrides = published_splits(arguments.model, arguments.gpus)
        elif arguments.overrides:
            overrides = load_overrides(arguments.overrides)
        shape = MODEL_SHAPES[arguments.model]
        return [
            plan_token_split(
                num_tokens,
                arguments.context,
                shape,
                arguments.gpus,
                profile,
                launch=arguments.launch,
                overrides=overrides,
            )
            for num_tokens in sorted(set(arguments.tokens))
        ]
    except OSError as error:
        raise UserError(f"--overrides {arguments.overrides}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(str(error)) from error


def published_splits(model: str, gpus: int):
    if model not in published.SPLITS or gpus != 8:
        raise UserError(f"--overrides published: there is no published table for {model} on {gpus} GPUs")
    return published.SPLITS[model]


def replayed(plan: SplitPlan, arguments: argparse.Namespace, profile: HardwareProfile) -> list[Span]:
    shape = MODEL_SHAPES[arguments.model]
    times = weave_pass(plan, arguments.context, shape, arguments.gpus, profile)
    return replay(weave_tasks(times, shape.num_layers))


# ------------------------------------------------------------------------------------------------------------- printing


def decision(plan: SplitPlan) -> str:
    if plan.kind != "split":
        return {"fuse": "fuse, no split", "none": "neither"}[plan.kind]
    return f"{plan.split} + {plan.num_tokens - plan.split}, CTAs {plan.attention_ctas}/{plan.mlp_ctas}"


def print_plans(title: str, plans: list[SplitPlan]) -> None:
    def cell(plan: SplitPlan, mode: str) -> str:
        return f"{plan.predicted_us[mode] / 1e3:.1f}" if mode in plan.predicted_us else "-"

    def speedup(plan: SplitPlan) -> str:
        chosen = {"split": "weave", "fuse": "fused", "none": "reference"}[plan.kind]
        return f"{plan.predicted_us['reference'] / plan.predicted_us[chosen]:.2f}"

    print_table(
        f"Simulation: {title}, milliseconds of one forward pass",
        ("tokens", *(mode.replace("_", " ") for mode in MODES), "plan", "speed-up"),
        [(str(p.num_tokens), *(cell(p, mode) for mode in MODES), decision(p), speedup(p)) for p in plans],
    )


def published_ms(model: str, gpus: int, context: int) -> dict[int, dict[str, float]]:
    """By tokens and mode, what the authors measured of this; empty if nothing."""
    if model not in published.LATENCY_MS or gpus != 8 or context:
        return {}
    columns = published.LATENCY_MS[model]
    return {
        tokens: {mode: values[index] for mode, values in columns.items()}
        for index, tokens in enumerate(published.TOKENS)
    }


def print_against_published(model: str, profile: HardwareProfile, tokens: list[int]) -> None:
    """As the authors ran it, in eager mode with their own splits; rows that constants were fitted to stand apart."""
    rows = [row for row in fitting.latency_rows(profile, model) if row.num_tokens in tokens]
    for is_fit, words in ((True, "rows that two constants were fitted to"), (False, "held-out rows")):
        chosen = [row for row in rows if row.is_fit == is_fit]
        if not chosen:
            continue
        print_table(
            f"Simulation against publication, {words}: {model}, 8 GPUs, eager, the authors' splits",
            ("tokens", "mode", "simulated ms", "published ms", "error"),
            [
                (str(r.num_tokens), r.mode, f"{r.predicted_ms:.1f}", f"{r.published_ms:g}", f"{r.error:+.1%}")
                for r in chosen
            ],
        )
        console().print(f"Mean |error| {mean(abs(row.error) for row in chosen):.1%}\n")
    speedups = [r for r in fitting.speedup_rows(profile, model) if r.num_tokens in tokens]
    fitted = [str(num_tokens) for num_tokens, mode in fitting.FIT_ROWS.get(model, ()) if mode == "weave"]
    how = f"held out but for weave at {', '.join(fitted)} tokens" if fitted else "held out"
    print_table(
        f"Simulation against publication: speed-up of weave over reference, {model} ({how})",
        ("tokens", "GPUs", "simulated", "published", "error"),
        [
            (str(r.num_tokens), str(r.world_size), f"{r.predicted:.3f}", f"{r.published:.3f}", f"{r.error:+.3f}")
            for r in sorted(speedups, key=lambda r: (-r.world_size, r.num_tokens))
        ],
    )


def experts_rows(profile: HardwareProfile) -> list[tuple[str, ...]]:
    """What the planner itself says of Mixtral on 8 GPUs, where the host is what weave loses by."""
    rows = []
    for num_tokens in (1024, 2048, 4096):
        eager, graph = (
            plan_token_split(num_tokens, 0, MODEL_SHAPES["mixtral-8x22b"], 8, profile, launch=launch)
            for launch in ("eager", "graph")
        )
        us = graph.predicted_us
        latencies = (us["reference"], us["fused"], eager.predicted_us["weave"], us["weave"])
        rows.append((str(num_tokens), *(f"{latency / 1e3:.1f}" for latency in latencies), eager.kind, graph.kind))
    return rows


def sensitivity_rows(profile: HardwareProfile) -> list[tuple[str, ...]]:
    rows = []
    for name, change in ({"as built in": {}} | fitting.OTHER_ASSUMPTIONS).items():
        errors = fitting.dense_errors(fitting.fit(replace(profile, **change)))
        latencies = (f"{100 * mean(sizes):.1f} %" for sizes in (errors.fit, errors.held_out))
        speedups = (
            f"{mean(sizes):.3f}, {max(sizes):.3f}" for sizes in (errors.speedups_8_gpus, errors.speedups_4_gpus)
        )
        rows.append((name, *latencies, *speedups))
    return rows


def print_sensitivity(profile: HardwareProfile) -> None:
    console().print()
    print_table(
        "Errors under other assumptions, Llama and Qwen, everything fitted again each time",
        ("assumption", "fit rows", "held-out latencies", "speed-up, 8 GPUs: mean, largest", "4 GPUs"),
        sensitivity_rows(profile),
    )


def print_check(profile: HardwareProfile) -> None:
    """Everything that docs/planner.md says of the constants and the errors, other assumptions apart."""
    refitted = fitting.fit(profile)
    constants = [(name, getattr(profile, name), getattr(refitted, name)) for name in fitting.FITTED]
    constants += [(name, getattr(profile.link, name), getattr(refitted.link, name)) for name in fitting.FITTED_LINK]
    print_table(
        "Constants of the profile, and what the fit gives now",
        ("constant", "profile", "fit"),
        [(name, f"{stored:.4g}", f"{found:.4g}") for name, stored, found in constants],
    )
    link = fitting.link_rows(profile)
    errors = [abs(row[2] / row[3] - 1) for row in link]
    console().print(
        f"\nLink model, {len(link)} kernel times: mean |error| {mean(errors):.1%}, largest {max(errors):.1%}"
    )
    tax = fitting.split_tax_rows(profile)
    print_table(
        "Wave model alone: two GEMMs of equal halves over those of the whole (held out)",
        ("tokens", "unsplit us", "published", "halves / unsplit", "published"),
        [
            (
                str(r.num_tokens),
                f"{r.unsplit_us:.0f}",
                f"{r.published_unsplit_us:.0f}",
                f"{r.tax:.3f}",
                str(r.published_tax),
            )
            for r in tax
        ],
    )
    console().print(f"Mean |error| of the split tax: {mean(abs(r.tax - r.published_tax) for r in tax):.3f}\n")
    for model in published.LATENCY_MS:
        print_against_published(model, profile, list(published.TOKENS))
        console().print()
    print_table(
        "Simulation: mixtral-8x22b on 8 GPUs, milliseconds, the planner's own splits",
        ("tokens", "reference", "fused", "weave, eager", "weave, graph", "plan, eager", "plan, graph"),
        experts_rows(profile),
    )
    held_out = fitting.dense_errors(profile).held_out
    console().print(
        f"\nHeld-out latencies of Llama and Qwen, {len(held_out)} rows: mean |error| {mean(held_out):.1%}, "
        f"largest {max(held_out):.1%}"
    )
    speedups = [r for m in fitting.DENSE_MODELS for r in fitting.speedup_rows(profile, m)]
    for name, sizes in (("8 GPUs", (8,)), ("4 GPUs", (4,)), ("all", (8, 4))):
        chosen = [r for r in speedups if r.world_size in sizes]
        ours, null = [abs(r.error) for r in chosen], [abs(e) for e in fitting.null_model_errors(chosen)]
        console().print(
            f"Speed-ups, {name}, {len(chosen)} rows: mean |error| {mean(ours):.3f}, largest {max(ours):.3f}, "
            f"{sum(e > 0.04 for e in ours)} over 0.04; the best constant speed-up: {mean(null):.3f}, {max(null):.3f}, "
            f"{sum(e > 0.04 for e in null)}"
        )


# --------------------------------------------------------------------------------------------------------- the command


def run(arguments: argparse.Namespace) -> None:
    profile = load_profile(arguments.gpu)
    if arguments.context < 0:
        raise UserError(f"--context must be at least 0, got {arguments.context}")
    plans = make_plans(arguments, profile)
    output = arguments.output.resolve()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {arguments.output}: cannot make this folder: {error.strerror}") from error

    title = f"{arguments.model} on {arguments.gpus} x {profile.name}, {arguments.launch}"
    if arguments.context:
        title += f", {arguments.context} tokens of context"
    print_plans(title, plans)
    console().print()
    truth = published_ms(arguments.model, arguments.gpus, arguments.context) if profile is H100 else {}
    sizes = [plan.num_tokens for plan in plans]
    if arguments.check:
        print_check(profile)
    elif truth.keys() & set(sizes):
        print_against_published(arguments.model, profile, sizes)
    if arguments.sensitivity:
        print_sensitivity(profile)

    split_plans = [plan for plan in plans if plan.kind == "split"]
    spans, layers = None, range(0)
    if split_plans:
        drawn = split_plans[len(split_plans) // 2]
        spans = replayed(drawn, arguments, profile)
        middle = MODEL_SHAPES[arguments.model].num_layers // 2
        layers = range(middle, middle + DRAWN_LAYERS)
        title += f"; lanes: {drawn.num_tokens} tokens as {decision(drawn)}"
    report = {
        "simulation": True,
        "model": arguments.model,
        "gpus": arguments.gpus,
        "context": arguments.context,
        "profile": json.loads(profile.to_json()),
        "plans": [asdict(plan) | {"hash": plan.hash} for plan in plans],
        "published_ms": {str(tokens): truth[tokens] for tokens in sizes if tokens in truth},
        "lanes": [
            {**asdict(span.task), "begin_us": span.begin_us, "end_us": span.end_us}
            for span in spans or ()
            if span.task.layer in layers
        ],
    }
    json_path, png_path = output / "simulation.json", output / "simulation.png"
    json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    latency_ms = {p.num_tokens: {mode: us / 1e3 for mode, us in p.predicted_us.items()} for p in plans}
    draw(png_path, title, spans, layers, latency_ms, truth)
    console().print(f"\nSimulation: {json_path} and {png_path}")
