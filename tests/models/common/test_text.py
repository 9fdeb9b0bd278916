"""The byte tokenizer and the text that models are run on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenweave_models.common import corpus
from tokenweave_models.common.tokenizer import ByteTokenizer


@given(st.text())
def test_decode_gives_the_text_back(text):
    tokens = ByteTokenizer().encode(text)
    assert tokens.shape == (len(text.encode("utf-8")),)
    assert ByteTokenizer().decode(tokens) == text


@given(st.binary())
def test_tokens_are_bytes(data):
    text = data.decode("latin-1")
    tokens = ByteTokenizer().encode(text)
    assert tokens.dtype == torch.int64
    assert bytes(tokens.tolist()) == text.encode("utf-8")
    assert ((tokens >= 0) & (tokens < ByteTokenizer.vocab_size)).all()


def test_a_cut_character_is_replaced():
    tokens = ByteTokenizer().encode("a\u00e9")
    assert ByteTokenizer().decode(tokens[:2]) == "a\ufffd"


@pytest.fixture
def checkout(tmp_path):
    for name, text in {
        "bench/run.py": "",
        "csrc/core/op.h": "",
        "README.md": "readme",
        "docs/b.md": "second",
        "docs/a.md": "first",
    }.items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "checkout"


def test_text_of_a_checkout_is_its_documents(checkout):
    assert corpus.project_text(checkout) == ("readme\nfirst\nsecond", "3 documents of this checkout")


def test_text_without_a_checkout_is_the_package_source():
    text, source = corpus.project_text(None)
    assert "def add_rms_norm_(" in text
    assert "source" in source


def test_a_checkout_without_documents_falls_back(checkout):
    for path in checkout.rglob("*.md"):
        path.unlink()
    assert corpus.project_text(checkout) == corpus.project_text(None)


def test_checkout_is_found_around_the_current_directory(checkout, monkeypatch, tmp_path):
    # As if the package were installed elsewhere.
    monkeypatch.setattr(
        corpus, "__file__", str(tmp_path / "site-packages" / "tokenweave_models" / "common" / "corpus.py")
    )
    monkeypatch.chdir(checkout / "docs")
    assert corpus.find_checkout() == checkout
    monkeypatch.chdir(tmp_path)
    assert corpus.find_checkout() is None


def test_checkout_is_found_around_a_package_installed_in_place(checkout, monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "__file__", str(checkout / "python" / "tokenweave_models" / "common" / "corpus.py"))
    monkeypatch.chdir(tmp_path)
    assert corpus.find_checkout() == checkout
