"""Decodes prompts of the made-up language with a policy and counts what is right, in how many passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from tokenweave_models.localleap.decoding import Commit
from tokenweave_models.localleap.demo.lexicon import ANSWER_LENGTH, MASK_ID, PROMPT_LENGTH, Lexicon, spell
from tokenweave_models.localleap.demo.training import one_thread
from tokenweave_models.localleap.generate import Generation, generate
from tokenweave_models.localleap.model import DiffusionModel

BLOCK_LENGTH = ANSWER_LENGTH // 2
PROMPTS_SEED = 99  # no training starts from it


@dataclass(frozen=True)
class Setting:
    """A policy and its numbers; None: the published default. tokens_per_step is of topk."""

    policy: str
    threshold: float | None = None
    relaxed_threshold: float | None = None
    radius: int | None = None
    tokens_per_step: int = 1

    def __str__(self) -> str:
        if self.policy == "topk":
            return f"topk, {self.tokens_per_step} a pass"
        if self.policy == "local_leap":
            return f"local_leap {self.threshold} / {self.relaxed_threshold} / W {self.radius}"
        return f"{self.policy}{'' if self.threshold is None else f' {self.threshold}'}"


def local_leap(kappa: float = 0.9, tau: float = 0.75, radius: int = 4) -> Setting:
    return Setting("local_leap", kappa, tau, radius)


def threshold(theta: float = 0.9) -> Setting:
    return Setting("threshold", theta)


def topk(tokens_per_step: int = 1) -> Setting:
    return Setting("topk", tokens_per_step=tokens_per_step)


@dataclass(frozen=True)
class Result:
    """What a setting made of a set of prompts.

    Attributes:
        words_right, answers_right: shares; of answers all words must be right.
        free_right: of the words that left a choice; None if none did.
        passes: of the model, mean per sequence (NFE).
        tokens_per_pass: decided by one pass for one sequence, mean.
        model_s, selector_s: wall time of all passes, and of choosing what they commit.
    """

    prompt_set: str
    setting: Setting
    num_prompts: int
    words_right: float
    answers_right: float
    free_right: float | None
    passes: float
    tokens_per_pass: float
    model_s: float
    selector_s: float


def prompts_of(lexicon: Lexicon, prompt_set: str, num_prompts: int) -> Tensor:
    """[num_prompts, PROMPT_LENGTH] int64, always the same."""
    return lexicon.draw(prompt_set, num_prompts, Generator().manual_seed(PROMPTS_SEED))[0]


def evaluate(model: DiffusionModel, lexicon: Lexicon, prompt_set: str, num_prompts: int, setting: Setting) -> Result:
    prompts = prompts_of(lexicon, prompt_set, num_prompts)
    done = _decode(model, prompts, setting)
    right, free = lexicon.judge(prompts, torch.stack(done.tokens))
    passes = sum(found.forward_passes for found in done.statistics) / num_prompts
    return Result(
        prompt_set=prompt_set,
        setting=setting,
        num_prompts=num_prompts,
        words_right=right.double().mean().item(),
        answers_right=right.all(dim=1).double().mean().item(),
        free_right=right[free].double().mean().item() if free.any() else None,
        passes=passes,
        tokens_per_pass=ANSWER_LENGTH / passes,
        model_s=done.model_s,
        selector_s=done.selector_s,
    )


def first_block_by_pass(model: DiffusionModel, prompt: Tensor, setting: Setting) -> list[str]:
    """The first block of one prompt's answer after each pass, spelled, until it is full."""
    answer = torch.full((ANSWER_LENGTH,), MASK_ID)
    states: list[str] = []

    def on_commit(commits: list[Commit]) -> None:
        if (answer[:BLOCK_LENGTH] == MASK_ID).any():
            for commit in commits:
                answer[commit.position - PROMPT_LENGTH] = commit.token
            states.append(spell(answer[:BLOCK_LENGTH]))

    _decode(model, prompt[None], setting, on_commit)
    return states


@one_thread()
def _decode(
    model: DiffusionModel,
    prompts: Tensor,
    setting: Setting,
    on_commit: Callable[[list[Commit]], None] | None = None,
) -> Generation:
    return generate(
        model,
        list(prompts),
        policy=setting.policy,
        threshold=setting.threshold,
        relaxed_threshold=setting.relaxed_threshold,
        radius=setting.radius,
        steps=-(-BLOCK_LENGTH // setting.tokens_per_step),
        gen_length=ANSWER_LENGTH,
        block_length=BLOCK_LENGTH,
        on_commit=on_commit,
    )


def area_under_curve(results: Iterable[Result]) -> float:
    """Of quality against passes: for every budget of 1 to ANSWER_LENGTH passes the largest share of right words that
    one of these settings reached within it (0 if none was so fast), and of those the mean. 1 is perfect in one pass."""
    reached = [(result.passes, result.words_right) for result in results]
    best = [
        max((quality for passes, quality in reached if passes <= budget), default=0.0)
        for budget in range(1, ANSWER_LENGTH + 1)
    ]
    return sum(best) / len(best)
