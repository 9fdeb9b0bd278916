"""The made-up language of the demo: what it draws, and what counts as right."""

import pytest
import torch
from tokenweave_models.localleap.demo import lexicon as words
from tokenweave_models.localleap.demo.lexicon import (
    NUM_SLOTS,
    PROMPT_SETS,
    SLOT_LENGTH,
    WORD_LENGTH,
    Lexicon,
)

SHARE = 0.2


def draw(lexicon, name, num_prompts=200, seed=1):
    return lexicon.draw(name, num_prompts, torch.Generator().manual_seed(seed))


def slots_of(answers):
    return answers.unflatten(1, (NUM_SLOTS, SLOT_LENGTH))


def kind_of(prompts, kind):
    """[num_prompts, NUM_SLOTS] bool: the slots whose symbol is of this kind."""
    begin = words.FIRST_SYMBOL
    for name, count in words.NUM_SYMBOLS.items():
        if name == kind:
            return (prompts[:, 1:] >= begin) & (prompts[:, 1:] < begin + count)
        begin += count
    raise KeyError(kind)


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_what_is_not_smudged_is_right(name):
    lexicon = Lexicon(0, 0.0)
    prompts, answers = draw(lexicon, name)
    assert prompts.shape == (200, words.PROMPT_LENGTH)
    assert answers.shape == (200, words.ANSWER_LENGTH)
    assert prompts[:, 0].unique().tolist() == [words.SMUDGED[PROMPT_SETS[name].smudged]]
    assert prompts[:, 1:].min() >= words.FIRST_SYMBOL
    assert prompts.max() < lexicon.vocab_size
    assert not (answers == words.MASK_ID).any()
    assert lexicon.judge(prompts, answers).right.all()
    for kind in PROMPT_SETS[name].kinds:
        share = kind_of(prompts, kind).double().mean().item()
        assert share == pytest.approx(1 / len(PROMPT_SETS[name].kinds), abs=0.1)


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_one_wrong_token_is_a_wrong_word(name):
    lexicon = Lexicon(0, 0.0)
    prompts, answers = draw(lexicon, name)
    for place in range(SLOT_LENGTH):
        for slot in range(NUM_SLOTS):
            changed = answers.clone()
            changed[:, slot * SLOT_LENGTH + place] = words.EOS_ID
            right = lexicon.judge(prompts, changed).right
            # Of the other words, only copies of its letters are wrong now.
            is_spoilt = torch.zeros_like(right)
            is_spoilt[:, slot] = True
            if place < WORD_LENGTH and slot + 1 < NUM_SLOTS:
                is_spoilt[:, slot + 1] = kind_of(prompts, "copy")[:, slot + 1]
            assert torch.equal(right, ~is_spoilt)


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_only_what_the_prompt_says_is_smudged(name):
    lexicon = Lexicon(0, SHARE)
    _, answers = draw(lexicon, name, 2000)
    _, clean = draw(Lexicon(0, 0.0), name, 2000)
    changed = (slots_of(answers) != slots_of(clean)).double().mean(dim=(0, 1)).tolist()
    smudged = PROMPT_SETS[name].smudged
    letter = SHARE * (1 - 1 / words.NUM_LETTERS)  # a random letter may be the right one
    assert changed[:WORD_LENGTH] == pytest.approx([letter if smudged == "letters" else 0.0] * WORD_LENGTH, abs=0.02)
    assert changed[WORD_LENGTH] == pytest.approx(SHARE if smudged == "separators" else 0.0, abs=0.02)
    assert (answers <= words.SEPARATOR).all()


def test_the_likeliest_letters_of_a_hard_word_are_wrong_together():
    lexicon = Lexicon(0, 0.0)
    prompts, answers = draw(lexicon, "far", 2000)
    slots = slots_of(answers)
    majority = slots.clone()
    for symbol in prompts[:, 1:].unique():
        found = prompts[:, 1:] == symbol
        letters = slots[found][:, :WORD_LENGTH]
        base = letters.mode(dim=0).values
        assert (letters == base).double().mean(dim=0).tolist() == pytest.approx([0.8] * WORD_LENGTH, abs=0.03)
        assert ((letters != base).sum(dim=1) == 1).all()
        majority[found] = torch.cat((base, torch.tensor([words.SEPARATOR])))
    assert not lexicon.judge(prompts, majority.flatten(1)).right.any()


def test_where_a_symbol_leaves_a_choice():
    lexicon = Lexicon(0, 0.0)
    prompts, answers = draw(lexicon, "main", 3000)
    free = lexicon.judge(prompts, answers).free
    assert torch.equal(free, kind_of(prompts, "category"))
    slots = slots_of(answers)[:, :, :WORD_LENGTH]
    for symbol in prompts[:, 1:].unique():
        found = prompts[:, 1:] == symbol
        assert len(slots[found].unique(dim=0)) == (words.NUM_WORDS["category"] if free[found].any() else 1)
    # A word of one category is wrong in the other.
    first, second = (words.FIRST_SYMBOL + words.NUM_SYMBOLS["fixed"] + number for number in (0, 1))
    of_first = prompts[:, 1] == first
    other = prompts[of_first].clone()
    other[:, 1] = second
    assert not lexicon.judge(other, answers[of_first]).right[:, 0].any()


def test_a_seed_decides_everything():
    same, other = Lexicon(0, SHARE), Lexicon(1, SHARE)
    assert torch.equal(same.words, Lexicon(0, SHARE).words)
    assert not torch.equal(same.words, other.words)
    for first, second in zip(draw(same, "main"), draw(Lexicon(0, SHARE), "main"), strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(draw(same, "main")[0], draw(same, "main", seed=2)[0])


def test_spelling():
    assert words.spell(torch.tensor([0, 25, words.MASK_ID, words.SEPARATOR, words.EOS_ID])) == "az.|?"
