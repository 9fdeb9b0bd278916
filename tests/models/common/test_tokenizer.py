"""The tokenizer of a model's folder, what ends a text, and text that comes token by token.

The two tokenizers are built here as Llama 3's and Qwen's are (byte-level pairs), and as Mixtral's is (words with their
leading space, bytes where a character has no token).
"""

import json
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: no tokenizer.json can be read")

from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402
from tokenweave_models.common.errors import UserError  # noqa: E402
from tokenweave_models.common.tokenizer import (  # noqa: E402
    ByteTokenizer,
    FolderTokenizer,
    TextStream,
    eos_tokens,
)

TEXT = "Hello hello w\u00f6rld, \u65e5\u672c\u8a9e \U0001f642\U0001f643 na\u00efve  caf\u00e9\n"
BOS, EOS = 0, 1


def byte_level() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return made


def byte_fallback() -> tokenizers.Tokenizer:
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581Helorwd,", "\u2581H", "ll"]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    merges = [("\u2581", "H"), ("l", "l")]
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.add_special_tokens(["<s>", "</s>"])
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return made


@pytest.fixture(scope="module", params=[byte_level, byte_fallback], ids=["byte level", "byte fallback"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    request.param().save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return path


def streamed(tokenizer, tokens) -> tuple[list[str], str]:
    """(what was printed after each token, what came at the end)"""
    stream = TextStream(tokenizer.decode)
    return [stream.add(token) for token in tokens], stream.end()


# ------------------------------------------------------------------------------------------------------ of a folder


def test_text_becomes_tokens_and_text_again(folder):
    tokenizer = FolderTokenizer(folder)
    tokens = tokenizer.encode(TEXT)
    assert tokens.dtype == torch.int64
    assert tokens[0] == BOS  # the special token is there, and is not text
    assert tokens[1:].min() > EOS
    assert tokens.max() < tokenizer.vocab_size
    assert len(tokens) < 1 + len(TEXT.encode())  # some tokens are longer than a byte
    assert tokenizer.decode(tokens) == tokenizer.decode(tokens.tolist()) == TEXT
    assert tokenizer.eos_tokens == {EOS}


def test_tokens_of_a_padded_vocabulary_are_no_text(folder):
    tokenizer = FolderTokenizer(folder)
    tokens = [*tokenizer.encode("Hello").tolist(), tokenizer.vocab_size, tokenizer.vocab_size + 5]
    assert tokenizer.decode(tokens) == "Hello"
    pieces, rest = streamed(tokenizer, tokens)
    assert "".join(pieces) + rest == "Hello"


def test_what_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        FolderTokenizer("nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r": has no tokenizer.json; no other format of tokenizers is read$"):
        FolderTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match=r"tokenizer.json: is not a tokenizer: "):
        FolderTokenizer(tmp_path)


def test_without_the_package_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"^tokenizers is not installed; run: pip install 'tokenweave-ops\[models\]'$"):
        FolderTokenizer(folder)


@pytest.mark.parametrize(
    "config, generation, expected",
    [
        ({"eos_token_id": 2}, None, {2}),
        ({"eos_token_id": [2, 3]}, None, {2, 3}),
        ({"eos_token_id": 2}, {"eos_token_id": [7, 2]}, {7, 2}),
        ({"eos_token_id": 2}, {"eos_token_id": None}, {2}),
        ({"eos_token_id": 2}, {}, {2}),
        ({"eos_token_id": None}, None, set()),
        ({}, None, set()),
    ],
)
def test_what_ends_a_text(tmp_path, config, generation, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert eos_tokens(tmp_path) == expected


@pytest.mark.parametrize("value", ["2", [2, None], -1, True, 2.5])
def test_what_cannot_end_a_text(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=r"config.json: eos_token_id must be a token or a list of tokens, got "):
        eos_tokens(tmp_path)


# --------------------------------------------------------------------------------------------------- token by token


def test_a_character_is_printed_when_it_is_whole():
    pieces, rest = streamed(ByteTokenizer(), "a\u00e9\U0001f642b".encode())
    assert pieces == ["a", "", "\u00e9", "", "", "", "\U0001f642", "b"]
    assert rest == ""


def test_a_character_that_stays_cut_is_replaced_at_the_end():
    pieces, rest = streamed(ByteTokenizer(), "ab\U0001f642".encode()[:-1])
    assert pieces == ["a", "b", "", "", ""]
    assert rest == "\ufffd"


def test_words_come_at_once_and_spaces_are_kept(folder):
    tokenizer = FolderTokenizer(folder)
    pieces, rest = streamed(tokenizer, tokenizer.encode("Hello  Hello").tolist())
    assert "".join(pieces) == "Hello  Hello"
    assert rest == ""
    assert sum(piece == "" for piece in pieces) <= 2  # the special token, and at most one of spaces


@given(text=st.text())
@example(text=TEXT)
@example(text=" Hello")
@example(text="a\ufffd")
@example(text="\u65e5\u672c")
def test_pieces_are_the_text_and_never_half_a_character(folder, text):
    for tokenizer in (FolderTokenizer(folder), ByteTokenizer()):
        tokens = tokenizer.encode(text).tolist()
        pieces, rest = streamed(tokenizer, tokens)
        assert "".join(pieces) + rest == tokenizer.decode(tokens)
        assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.data())
def test_any_tokens_can_be_printed(folder, data):
    """A model may say anything. What was never UTF-8 may come out otherwise than at once, but it comes, and ends."""
    tokenizer = FolderTokenizer(folder)
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=30))
    pieces, rest = streamed(tokenizer, tokens)
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    assert bool("".join(pieces) + rest) == bool(tokenizer.decode(tokens))
