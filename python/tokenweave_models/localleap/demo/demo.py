"""`tokenweave localleap demo`: a small diffusion language model, trained here, decoded with every selection policy.

It answers what LocalLeap buys and what it does not, on prompts for which it is known which answers are right: a main
set that is in its favour, a control that is not, and two stress sets whose likeliest letters are wrong together.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import torch

from tokenweave_models.common.arguments import positive
from tokenweave_models.common.console import console, print_table, progress
from tokenweave_models.common.errors import UserError
from tokenweave_models.common.output import check_output, write_json
from tokenweave_models.localleap.demo import training
from tokenweave_models.localleap.demo.evaluation import (
    BLOCK_LENGTH,
    Result,
    Setting,
    area_under_curve,
    evaluate,
    first_block_by_pass,
    local_leap,
    prompts_of,
    threshold,
    topk,
)
from tokenweave_models.localleap.demo.lexicon import PROMPT_SETS, Lexicon
from tokenweave_models.localleap.demo.plot import draw
from tokenweave_models.localleap.demo.training import Recipe
from tokenweave_models.localleap.model import DiffusionModel

# Every policy of tokenweave_ops.POLICIES with its published numbers, some also with others.
POLICY_SETTINGS = (
    topk(1), topk(2), topk(4), Setting("topk_margin"), Setting("topk_entropy"),
    threshold(0.9), threshold(0.75), threshold(0.5), Setting("factor", 1.0), Setting("margin", 0.9),
    Setting("eb", 0.001), Setting("entropy_threshold", 0.45), Setting("klass", 0.6, 0.01),
    local_leap(radius=0), local_leap(radius=1), local_leap(radius=2), local_leap(), local_leap(radius=8),
    local_leap(tau=0.5), local_leap(tau=0.5, radius=BLOCK_LENGTH),
)  # fmt: skip
OTHER_SETTINGS = (topk(1), threshold(0.9), threshold(0.75), threshold(0.5), local_leap(), local_leap(tau=0.5))
TAUS = (0.9, 0.8, 0.75, 0.6, 0.5, 0.3, 0.0)
SWEEPS: Mapping[str, Sequence[Setting]] = {
    "topk": [topk(k) for k in (1, 2, 4, 8, 24)],
    "threshold": [threshold(theta) for theta in sorted((0.95, 0.85, *TAUS), reverse=True)],
    "local_leap, kappa": [local_leap(kappa=kappa) for kappa in (0.99, 0.9, 0.8, 0.75)],
    "local_leap, tau": [local_leap(tau=tau) for tau in TAUS],
    "local_leap, W": [local_leap(radius=radius) for radius in (0, 1, 2, 4, 8)],
}
OTHER_SETS_SHARE = 4  # the control and the stress sets have a quarter of the main set's prompts

# What the demo must show: passes of local_leap over those of threshold 0.9, at most, and the loss of right words.
MAX_PASSES_RATIO, MAX_LOSS = 0.7, 0.01

Key = tuple[str, Setting]


@dataclass(frozen=True)
class Target:
    words: str
    is_met: bool


def targets_of(results: Mapping[Key, Result]) -> list[Target]:
    base, leap = results["main", threshold(0.9)], results["main", local_leap()]
    no_window = results["main", local_leap(radius=0)]
    ratio, loss = leap.passes / base.passes, base.words_right - leap.words_right
    return [
        Target(
            f"passes of local_leap W 4 over those of threshold 0.9: {ratio:.3f}, at most {MAX_PASSES_RATIO}",
            ratio <= MAX_PASSES_RATIO,
        ),
        Target(f"words lost by it: {100 * loss:.2f} points, at most {100 * MAX_LOSS:.0f}", loss <= MAX_LOSS),
        Target(
            f"passes of local_leap W 0 and of threshold 0.9 are the same: {no_window.passes}, {base.passes}",
            no_window.passes == base.passes,
        ),
    ]


def settings_by_set() -> dict[str, list[Setting]]:
    """What is decoded, each setting once."""
    swept = [setting for sweep in SWEEPS.values() for setting in sweep]
    return {
        name: list(dict.fromkeys((*(POLICY_SETTINGS if name == "main" else OTHER_SETTINGS), *swept)))
        for name in PROMPT_SETS
    }


def decode_all(
    model: DiffusionModel, lexicon: Lexicon, wanted: Mapping[str, Iterable[Setting]], num_prompts: int
) -> dict[Key, Result]:
    """num_prompts: of the main set."""
    keys = [(name, setting) for name, settings in wanted.items() for setting in settings]
    results = {}
    with progress() as bar:
        task = bar.add_task("decoding", total=len(keys))
        for name, setting in keys:
            bar.update(task, description=f"decoding {name:7} {setting!s:28}")
            count = num_prompts if name == "main" else max(1, num_prompts // OTHER_SETS_SHARE)
            results[name, setting] = evaluate(model, lexicon, name, count, setting)
            bar.advance(task)
        bar.update(task, description="decoding")
    return results


def trained_model(recipe: Recipe, folder: Path, retrain: bool) -> tuple[DiffusionModel, float | None]:
    """(model, seconds of training or None if it was kept from before)."""
    model = None if retrain else training.load_trained(recipe, folder)
    if model is not None:
        console().print(f"Model: {training.weights_file(recipe, folder)} (--retrain trains it anew)")
        return model, None
    begin_s = perf_counter()
    recent: list[float] = []
    with progress() as bar:
        task = bar.add_task("training", total=recipe.steps)

        def on_step(loss: float) -> None:
            recent.append(loss)
            del recent[:-50]
            bar.update(task, advance=1, description=f"training, loss {sum(recent) / len(recent):.2f} nats")

        model = training.train(recipe, on_step)
    seconds = perf_counter() - begin_s
    try:
        training.keep(model, recipe, folder)
        kept = f"kept as {training.weights_file(recipe, folder)}"
    except UserError as error:
        kept = f"not kept: {error}"
    console().print(f"Model: trained in {seconds:.0f} s, {kept}")
    return model, seconds


# -------------------------------------------------------------------------------------------------------------- reports


def print_results(title: str, results: Iterable[Result]) -> None:
    print_table(
        title,
        ("policy", "words", "answers", "free words", "passes", "tokens / pass", "model s", "selector s"),
        [
            (
                str(found.setting),
                f"{found.words_right:.3f}",
                f"{found.answers_right:.3f}",
                "-" if found.free_right is None else f"{found.free_right:.3f}",
                f"{found.passes:.2f}",
                f"{found.tokens_per_pass:.2f}",
                f"{found.model_s:.2f}",
                f"{found.selector_s:.3f}",
            )
            for found in results
        ],
    )


def print_steps(model: DiffusionModel, lexicon: Lexicon) -> None:
    """The first block of one answer under two policies, pass by pass."""
    prompt = prompts_of(lexicon, "main", 1)[0]
    left, right = (first_block_by_pass(model, prompt, setting) for setting in (threshold(0.9), local_leap()))
    console().print("\nOne block, pass by pass (. is a mask, | a separator)")
    console().print(f"pass  {threshold(0.9)!s:{BLOCK_LENGTH}}  {local_leap()}")
    for number in range(max(len(left), len(right))):
        states = [steps[number] if number < len(steps) else "" for steps in (left, right)]
        console().print(f"{number + 1:4}  {states[0]:{BLOCK_LENGTH}}  {states[1]}".rstrip(), markup=False)


def print_areas(areas: Mapping[str, Mapping[str, float]]) -> None:
    print_table(
        "Area under the curve of right words against passes (mean over all budgets of 1 to 48 passes)",
        ("varied", *areas),
        [(sweep, *(f"{areas[name][sweep]:.3f}" for name in areas)) for sweep in SWEEPS],
    )


def reading(results: Mapping[Key, Result]) -> str:
    """What the numbers say, for and against."""

    def saved(name: str) -> str:
        base, leap = results[name, threshold(0.9)], results[name, local_leap()]
        change = 1 - leap.passes / base.passes
        loss = 100 * (base.words_right - leap.words_right)
        return f"{base.passes:.1f} to {leap.passes:.1f} passes ({change:.0%} fewer), {loss:+.1f} points of words lost"

    def of(name: str, setting: Setting) -> str:
        found = results[name, setting]
        return f"{found.words_right:.0%} of words in {found.passes:.1f} passes"

    def pooled(setting: Setting) -> str:
        parts = [results[name, setting] for name in ("main", "far")]
        words, passes = (sum(getattr(part, name) for part in parts) / 2 for name in ("words_right", "passes"))
        return f"{words:.0%} of words in {passes:.1f} passes"

    base, global_, leap = threshold(0.9), threshold(0.75), local_leap()
    return "\n".join(
        (
            "What LocalLeap (0.9 / 0.75 / W 4) buys over threshold 0.9:",
            f"  main     {saved('main')}",
            f"  control  {saved('control')}",
            "The main set was made for it: letters that are determined, of which the model is less than 0.9 sure.",
            "In the control the model is sure of what is determined, so there is less to gain.",
            "A global threshold of 0.75 on these two sets, beside it:",
            f"  main     {of('main', global_)}; LocalLeap {of('main', leap)}",
            f"  control  {of('control', global_)}; LocalLeap {of('control', leap)}",
            "Where moderate confidence is wrong, and no anchor is near to let LocalLeap trust it:",
            f"  far      threshold 0.75 {of('far', global_)}; LocalLeap {of('far', leap)}; threshold 0.9 "
            f"{of('far', base)}",
            f"  one setting for main and far alike: threshold 0.9 {pooled(base)}; 0.75 {pooled(global_)}; LocalLeap "
            f"{pooled(leap)}",
            "Beside an anchor it trusts the same moderate confidence:",
            f"  near     threshold 0.75 {of('near', global_)}; LocalLeap {of('near', leap)}; threshold 0.9 "
            f"{of('near', base)}",
        )
    )


# ------------------------------------------------------------------------------------------------------------- the demo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=positive, default=256, help="of the main set; a quarter of each other set")
    parser.add_argument("--retrain", action="store_true", help="even if the weights were kept from before")
    parser.add_argument(
        "--cache-folder", type=Path, default=None, help="where the weights are kept (~/.cache/tokenweave)"
    )
    parser.add_argument(
        "--png", type=Path, default=Path("build/localleap_demo.png"), help="quality against passes is drawn here"
    )
    parser.add_argument("--json", type=Path, default=None, help="write all numbers into this file")


def run(arguments: argparse.Namespace) -> None:
    if arguments.png.suffix != ".png":
        raise UserError(f"--png must name a .png file, got {arguments.png}")
    if importlib.util.find_spec("matplotlib") is None:  # known before the long work
        raise UserError("matplotlib is not installed; run: pip install 'tokenweave-ops[models]'")
    for path in (arguments.png, arguments.json):
        check_output(path)
    recipe = Recipe()
    folder = arguments.cache_folder or training.default_cache_folder()
    model, training_s = trained_model(recipe, folder, arguments.retrain)
    report(model, recipe, training_s, arguments.prompts, arguments.png, arguments.json)


def report(
    model: DiffusionModel,
    recipe: Recipe,
    training_s: float | None,
    num_prompts: int,
    png: Path | None = None,
    json_file: Path | None = None,
) -> None:
    """Everything behind the training. Raises UserError if a target was missed, once all is printed and written."""
    lexicon = training.lexicon_of(recipe)
    results = decode_all(model, lexicon, settings_by_set(), num_prompts)
    areas = {
        name: {sweep: area_under_curve(results[name, setting] for setting in swept) for sweep, swept in SWEEPS.items()}
        for name in PROMPT_SETS
    }
    print_steps(model, lexicon)
    for name, prompt_set in PROMPT_SETS.items():
        settings = POLICY_SETTINGS if name == "main" else OTHER_SETTINGS
        found = [results[name, setting] for setting in settings]
        print_results(f"{name}: {prompt_set.words}; {found[0].num_prompts} prompts", found)
    print_areas(areas)
    console().print(reading(results), markup=False)

    targets = targets_of(results)
    for target in targets:
        console().print(f"{'met' if target.is_met else 'MISSED'}: {target.words}")
    if json_file is not None:
        rows = [asdict(found) | {"policy": str(found.setting)} for found in results.values()]
        content = {
            "schema": 1,
            "torch": torch.__version__,
            "recipe": asdict(recipe),
            "training_s": training_s,
            "rows": rows,
            "areas": areas,
            "targets": [asdict(target) for target in targets],
        }
        write_json(json_file, content)
    if png is not None:
        draw(png, results, SWEEPS)
        console().print(f"Plot: {png}")
    if not all(target.is_met for target in targets):
        raise UserError("localleap demo: a target was missed; the list is above")
