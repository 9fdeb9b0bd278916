"""Text behind prompts, or in place of masks: all prompts in one batch."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenweave_models.common.arguments import positive
from tokenweave_models.common.console import console, print_table, print_text
from tokenweave_models.common.errors import UserError
from tokenweave_models.common.output import check_output, write_json
from tokenweave_models.common.tokenizer import FolderTokenizer
from tokenweave_models.localleap.checkpoint import load_model
from tokenweave_models.localleap.config import ModelConfig, load_config
from tokenweave_models.localleap.generate import Generation, generate, infill, plan_generate, plan_infill
from tokenweave_models.localleap.passes import CACHES
from tokenweave_models.localleap.runner import options
from tokenweave_models.localleap.runner.display import Draft, Live
from tokenweave_ops import POLICIES

# Arguments that are those of generate() and infill().
PASSED_ON = (
    *("policy", "threshold", "relaxed_threshold", "radius", "temperature", "steps"),
    *("cache", "block_length", "cuda_graph", "exact"),
)
OF_POLICY = "of the policy; not given: as published"
GEN_LENGTH = 128
# The policies that have a use for a number.
USERS = {
    "threshold": {"threshold", "factor", "local_leap", "eb", "entropy_threshold", "margin", "klass"},
    "relaxed_threshold": {"local_leap", "klass"},
    "radius": {"local_leap"},
    "steps": {"topk", "topk_margin", "topk_entropy", "klass"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", type=Path, metavar="FOLDER", required=True, help="a Hugging Face folder: LLaDA or Dream"
    )
    model.add_argument("--dtype", choices=tuple(options.DTYPES), help="of the weights; not given: as stored")
    options.add_device(model)
    text = parser.add_argument_group("text")
    text.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT",
        help="raw text, to which no chat template is applied; can be given several times",
    )  # fmt: skip
    text.add_argument(
        "--infill", action="store_true",
        help="prompts hold the tokenizer's mask token (LLaDA: <|mdm_mask|>, Dream: <|mask|>) where text is to be found",
    )  # fmt: skip
    text.add_argument(
        "--mask-run", type=positive, metavar="N", help="of --infill: tokens that a mask token stands for; not given: 1"
    )
    text.add_argument("--stream", action="store_true", help="show text while it is decoded")
    text.add_argument("--json", type=Path, metavar="FILE")
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--policy", choices=POLICIES, default="local_leap", metavar="NAME", help=", ".join(POLICIES))
    decoding.add_argument(
        "--threshold", type=options.fp32, metavar="X", help=f"kappa, theta, f, gamma or h {OF_POLICY}"
    )
    decoding.add_argument("--relaxed-threshold", type=options.fp32, metavar="X", help=f"tau or epsilon {OF_POLICY}")
    decoding.add_argument("--radius", type=options.whole_at_least_0, metavar="N", help=f"W {OF_POLICY}")
    decoding.add_argument(
        "--steps", type=positive, metavar="N", help="per block, of topk; not given: as many as it has tokens"
    )
    decoding.add_argument(
        "--temperature", type=options.temperature, default=0.0, metavar="T", help="0: the likeliest token"
    )
    decoding.add_argument(
        "--seed", type=options.seed, default=0, metavar="N", help="of the draws of the first prompt; others count on"
    )
    decoding.add_argument("--cache", choices=CACHES, default="none", help="what is not computed again in a block")
    options.add_lengths(decoding, gen_length=GEN_LENGTH)
    decoding.add_argument("--no-early-stop", action="store_true", help="go on behind a block that ends the text")
    decoding.add_argument("--exact", action="store_true", help="decide in float64 where fp32 is too close to call")


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuses what would be ignored; then fills in what was not given."""
    if arguments.infill:
        options.refuse_unused(arguments, "with --infill", "gen_length", "no_early_stop")
    else:
        options.refuse_unused(arguments, "without --infill", "mask_run")
    for name, policies in USERS.items():
        if arguments.policy not in policies:
            options.refuse_unused(arguments, f"with --policy {arguments.policy}", name)
    arguments.gen_length = arguments.gen_length or GEN_LENGTH
    arguments.mask_run = arguments.mask_run or 1


def tokens_of(arguments: argparse.Namespace, tokenizer: FolderTokenizer, config: ModelConfig) -> list[Tensor]:
    """Of each prompt, checked: everything that can be refused is refused before weights are loaded."""
    prompts = []
    for number, text in enumerate(arguments.prompt):
        tokens = tokenizer.encode(text)
        if len(tokens) and int(tokens.max()) >= config.vocab_size:
            raise UserError(
                f"prompt {number} has token {int(tokens.max())}, and the model knows tokens below {config.vocab_size}: "
                "tokenizer.json does not belong to config.json"
            )
        is_mask = tokens == config.mask_id
        if arguments.infill and not is_mask.any():
            raise UserError(
                f"--infill: prompt {number} has no mask token (its id is {config.mask_id}); write the tokenizer's mask "
                "token where text is to be found"
            )
        if not arguments.infill and is_mask.any():
            raise UserError(f"prompt {number} has the mask token; --infill decodes masks in a text")
        if len(tokens) + int(is_mask.sum()) * (arguments.mask_run - 1) > config.max_positions:
            raise UserError(f"prompt {number} has more than the model's {config.max_positions} positions")
        prompts.append(tokens.repeat_interleave(torch.where(is_mask, arguments.mask_run, 1)))
    with options.refused_in_words():
        if arguments.infill:
            plan_infill(config, prompts, arguments.block_length)
        else:
            plan_generate(config, prompts, arguments.gen_length, arguments.block_length)
    return prompts


def run(arguments: argparse.Namespace) -> None:
    check_arguments(arguments)
    check_output(arguments.json)
    config = load_config(arguments.model)
    tokenizer = FolderTokenizer(arguments.model)
    prompts = tokens_of(arguments, tokenizer, config)
    dtype = None if arguments.dtype is None else options.DTYPES[arguments.dtype]
    device = options.device_of(arguments.device)
    if arguments.cuda_graph:
        options.check_graph(device, [arguments.cache])
    with options.refused_in_words():
        model = load_model(arguments.model, dtype, device)

    behind = [] if arguments.infill else [config.mask_id] * arguments.gen_length
    drafts = [
        Draft([None if token == config.mask_id else token for token in [*prompt.tolist(), *behind]], tokenizer.decode)
        for prompt in prompts
    ]
    given: dict[str, Any] = {name: getattr(arguments, name) for name in PASSED_ON}
    given["seed"] = [arguments.seed + number for number in range(len(prompts))]
    given["vocab_limit"] = min(tokenizer.vocab_size, config.vocab_size)
    with options.refused_in_words(), Live(drafts) if arguments.stream else nullcontext() as live:
        given["on_commit"] = None if live is None else live.update
        if arguments.infill:
            found = infill(model, prompts, **given)
        else:
            stop = not arguments.no_early_stop
            found = generate(model, prompts, gen_length=arguments.gen_length, early_stop=stop, **given)
    texts = whole_texts(found, prompts, arguments.infill)
    if live is None or not live.has_printed:
        for number, tokens in enumerate(texts):
            label = f"[{number}] " if len(texts) > 1 else ""
            print_text(label + tokenizer.decode(tokens))
    print_statistics(found, arguments, model.embed_tokens.weight.dtype, device)
    write_json(arguments.json, {
        "model": str(arguments.model),
        "device": options.device_name(device),
        "torch": torch.__version__,
        "dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch."),
        "arguments": {name: value for name, value in given.items() if name != "on_commit"},
        "results": [
            {"prompt": prompt, "tokens": tokens.tolist(), "text": tokenizer.decode(tokens)}
            | vars(one) | {"tokens_per_forward": one.tokens_per_forward}
            for prompt, tokens, one in zip(arguments.prompt, found.tokens, found.statistics, strict=True)
        ],
    })  # fmt: skip


def whole_texts(found: Generation, prompts: list[Tensor], is_infill: bool) -> list[Tensor]:
    if is_infill:
        return found.tokens
    return [torch.cat((prompt, tokens)) for prompt, tokens in zip(prompts, found.tokens, strict=True)]


def print_statistics(
    found: Generation, arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> None:  # fmt: skip
    print_table(
        f"{arguments.policy}, cache {arguments.cache}, blocks of {arguments.block_length}, "
        f"{str(dtype).removeprefix('torch.')}, {options.device_name(device)}",
        ("prompt", "tokens", "forward passes", "tokens / pass", "model s", "selector s"),
        [
            (
                str(number), str(one.committed), str(one.forward_passes), f"{one.tokens_per_forward:.2f}",
                f"{one.model_s:.3f}", f"{one.selector_s:.4f}",
            )
            for number, one in enumerate(found.statistics)
        ],
    )  # fmt: skip
    if len(found.statistics) > 1:
        console().print(
            f"The prompts shared {found.steps} steps: {found.model_s:.3f} s of the model, {found.selector_s:.4f} s of "
            "the selector; a prompt's times are those of the steps it took part in."
        )
    if bad_rows := sum(one.bad_rows for one in found.statistics):
        console().print(f"{bad_rows} rows of logits had no finite maximum: the model computed NaN or infinity.")
