"""A made-up language small enough to be learned in a minute, and built so that it is known which answers are right.

A prompt says, symbol by symbol, which words to write; the answer is those words, each of 5 letters and a separator. It
has what makes parallel decoding of a diffusion model hard or easy, each apart:

- letters that are determined but about which the model is never quite sure: in the training data a share of them is
  smudged, that is replaced by a random letter. No smudged word counts as right;
- free choices, whose letters depend on each other: a symbol that stands for any of 16 words;
- tokens that are certain: separators.

The first token of a prompt says what is smudged in its answer: the letters, nothing, or the separators.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Generator, Tensor

NUM_LETTERS = 26
SEPARATOR, MASK_ID, EOS_ID = 26, 27, 28  # texts have one length, so nothing ever ends by EOS_ID
SMUDGED = {"letters": 29, "nothing": 30, "separators": 31}
FIRST_SYMBOL = 32

NUM_SLOTS = 8
WORD_LENGTH = 5
SLOT_LENGTH = WORD_LENGTH + 1
PROMPT_LENGTH = 1 + NUM_SLOTS
ANSWER_LENGTH = NUM_SLOTS * SLOT_LENGTH

# Symbols of each kind, and the words that one of them may stand for.
NUM_SYMBOLS = {"fixed": 12, "category": 2, "hard": 2, "copy": 1}
NUM_WORDS = {"fixed": 1, "category": 16, "hard": WORD_LENGTH, "copy": 1}


@dataclass(frozen=True)
class PromptSet:
    """A kind of prompts: what is smudged in their answers, and which kinds of symbols they hold, equally often."""

    smudged: str
    kinds: tuple[str, ...]
    words: str


PROMPT_SETS = {
    "main": PromptSet("letters", ("fixed", "category"), "letters determined but smudged, separators certain"),
    "control": PromptSet("nothing", ("category", "copy"), "nothing smudged, words chosen freely or copied"),
    "far": PromptSet("separators", ("hard",), "hard words, no anchor near"),
    "near": PromptSet("nothing", ("hard",), "hard words between certain separators"),
}


class Verdict(NamedTuple):
    """Both [num_prompts, NUM_SLOTS] bool."""

    right: Tensor  # the slot holds a word that its symbol allows, and a separator
    free: Tensor  # the symbol left a choice


class Lexicon:
    """The words of every symbol, drawn once from a seed.

    A "fixed" symbol stands for one word, a "category" for any of 16. A "hard" one stands for any of 5 words that differ
    from one base word, which is not among them, in one letter each, every one in another: each single letter is that of
    the base word in 4 of 5 words, and all 5 likeliest letters together are wrong. "copy" stands for the word before.

    Attributes:
        words: [num_symbols, 16, WORD_LENGTH] int64, those of a symbol first.
        num_words: [num_symbols] int64.
        vocab_size: tokens of prompts and answers are smaller.
    """

    def __init__(self, seed: int, smudged_share: float):
        self.smudged_share = smudged_share
        generator = Generator().manual_seed(seed)
        counts = [NUM_WORDS[kind] for kind, symbols in NUM_SYMBOLS.items() for _ in range(symbols)]
        self.num_words = torch.tensor(counts)
        self.words = torch.randint(NUM_LETTERS, (len(counts), max(counts), WORD_LENGTH), generator=generator)
        ends = accumulate(NUM_SYMBOLS.values(), initial=0)
        self._symbols = dict(zip(NUM_SYMBOLS, pairwise(ends), strict=True))  # begin and end
        self.vocab_size = FIRST_SYMBOL + len(counts)

        for symbol in range(*self._symbols["hard"]):
            base = self.words[symbol, -1]
            # Another letter than the base word's.
            changed = (base + torch.randint(1, NUM_LETTERS, (WORD_LENGTH,), generator=generator)) % NUM_LETTERS
            self.words[symbol, :WORD_LENGTH] = torch.where(torch.eye(WORD_LENGTH, dtype=torch.bool), changed, base)

    def draw(self, name: str, num_prompts: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """(prompts [num_prompts, PROMPT_LENGTH], answers [num_prompts, ANSWER_LENGTH]), int64, of PROMPT_SETS[name];
        answers as in the training data, smudged."""
        prompt_set = PROMPT_SETS[name]
        shape = (num_prompts, NUM_SLOTS)
        choices = torch.stack(
            [torch.randint(*self._symbols[kind], shape, generator=generator) for kind in prompt_set.kinds]
        )
        kinds = torch.randint(len(prompt_set.kinds), shape, generator=generator)
        kinds[:, 0] = 0 if "copy" in prompt_set.kinds else kinds[:, 0]  # there is nothing before to copy
        symbols = choices.gather(0, kinds[None])[0]
        drawn = (torch.rand(shape, generator=generator) * self.num_words[symbols]).long()
        words = self.words[symbols, drawn]
        for slot in range(1, NUM_SLOTS):
            copies = symbols[:, slot] == self._symbols["copy"][0]
            words[copies, slot] = words[copies, slot - 1]

        answers = torch.cat((words, torch.full((*shape, 1), SEPARATOR)), dim=2)
        smudge = torch.rand(answers.shape, generator=generator) < self.smudged_share
        if prompt_set.smudged != "letters":
            smudge[:, :, :WORD_LENGTH] = False
        if prompt_set.smudged != "separators":
            smudge[:, :, WORD_LENGTH:] = False
        answers = torch.where(smudge, torch.randint(NUM_LETTERS, answers.shape, generator=generator), answers)
        first = torch.full((num_prompts, 1), SMUDGED[prompt_set.smudged])
        return torch.cat((first, symbols + FIRST_SYMBOL), dim=1), answers.flatten(1)

    def judge(self, prompts: Tensor, answers: Tensor) -> Verdict:
        """Exactly, and against all words that are allowed. Shapes as those of ``draw``."""
        symbols = prompts[:, 1:] - FIRST_SYMBOL
        slots = answers.unflatten(1, (NUM_SLOTS, SLOT_LENGTH))
        words = slots[:, :, :WORD_LENGTH]
        allowed = torch.arange(self.words.shape[1]) < self.num_words[symbols][:, :, None]
        right = ((words[:, :, None] == self.words[symbols]).all(3) & allowed).any(2)
        same_as_before = (words == words.roll(1, dims=1)).all(2)
        right = torch.where(symbols == self._symbols["copy"][0], same_as_before, right)
        return Verdict(right & (slots[:, :, WORD_LENGTH] == SEPARATOR), self.num_words[symbols] > 1)


def spell(answer: Tensor) -> str:
    """Tokens [num_tokens] as text: letters, `|` for a separator, `.` for a mask, `?` for what no answer has."""
    others = {SEPARATOR: "|", MASK_ID: "."}
    return "".join(
        chr(ord("a") + token) if token < NUM_LETTERS else others.get(token, "?") for token in answer.tolist()
    )
