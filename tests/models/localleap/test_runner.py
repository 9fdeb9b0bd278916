"""`tokenweave localleap generate` and `bench` as a user starts them, on checkpoints laid out as the published ones."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plain_decoding import plain_decode, sharp_model
from small_models import CONFIG, some_tokens
from tokenweave_models import cli
from tokenweave_models.common.console import print_text
from tokenweave_models.localleap.checkpoint import load_model
from tokenweave_models.localleap.decoding import Commit
from tokenweave_models.localleap.runner import display
from tokenweave_models.localleap.runner.published_selector import published_selector

from tokenweave_ops import POLICIES, DecodeRequests
from tokenweave_ops.reference import anchor_decoding as reference

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytest.importorskip("rich")

import checkpoint_files  # noqa: E402 (needs safetensors)

MASK, EOS = 79, 77  # of the checkpoints
PROMPT = "say it"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_tokenizer(folder: Path) -> None:
    """One token per byte, of those that 77 tokens can name, and the special ones of the models."""
    pieces = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet(), key=lambda piece: (not piece.islower(), piece))[:77]
    pieces[-1] = "\u0120"  # the space
    vocab = {piece: token for token, piece in enumerate(pieces)} | {"<|end|>": EOS, "<|x|>": 78, "<|mask|>": MASK}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|end|>", "<|x|>", "<|mask|>"])
    made.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module", params=("llada", "dream"))
def folder(request, tmp_path_factory) -> Path:
    """Published keys and names, three files with an index, and a tokenizer."""
    config = {"llada": checkpoint_files.LLADA, "dream": checkpoint_files.DREAM}[request.param]
    found = checkpoint_files.write_checkpoint(tmp_path_factory.mktemp("models") / request.param, config, num_files=3)
    write_tokenizer(found)
    return found


@pytest.fixture(scope="module")
def model_and_tokenizer(folder):
    return load_model(folder, torch.float32), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def report_of(folder: Path, tmp_path: Path, *arguments: str) -> dict:
    path = tmp_path / "report.json"
    command = ["localleap", "generate", "--model", str(folder), "--dtype", "fp32", "--json", str(path)]
    assert cli.main([*command, "--device", "cpu", *arguments]) == 0
    return json.loads(path.read_text())


SIZES = ("--gen-length", "16", "--block-length", "8")


# ------------------------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_published_layout_decodes_through_the_command_line(folder, model_and_tokenizer, tmp_path, capsys, cache):
    model, tokenizer = model_and_tokenizer
    prompt = tokenizer.encode(PROMPT).ids
    assert tokenizer.decode(prompt) == PROMPT and len(prompt) == len(PROMPT)
    report = report_of(
        folder, tmp_path, "--prompt", PROMPT, *SIZES, "--cache", cache, "--threshold", "0.3", "--relaxed-threshold",
        "0.1", "--radius", "2", "--no-early-stop",
    )  # fmt: skip
    text = torch.tensor([*prompt, *[MASK] * 16])
    numbers = {"policy": "local_leap", "threshold": 0.3, "relaxed_threshold": 0.1, "radius": 2}
    trace = plain_decode(model.double(), text, (len(prompt), len(prompt) + 8), 8, cache=cache, **numbers)
    (result,) = report["results"]
    assert result["tokens"] == trace.tokens[len(prompt) :]
    assert result["forward_passes"] == len(trace.steps) and result["tokens_per_forward"] == 16 / len(trace.steps)
    assert result["text"] == tokenizer.decode(result["tokens"])
    printed = capsys.readouterr().out
    assert tokenizer.decode([*prompt, *result["tokens"]]) in printed
    assert str(result["forward_passes"]) in printed and f"cache {cache}" in printed


def test_prompts_share_a_batch_and_count_seeds_on(folder, tmp_path, capsys):
    sampled = ("--temperature", "1.5", "--policy", "threshold", "--no-early-stop", *SIZES)
    both = report_of(folder, tmp_path, "--prompt", "ab", "--prompt", "ab", "--seed", "3", *sampled)["results"]
    assert "[1] " in capsys.readouterr().out
    for number, seed in enumerate(("3", "4")):
        (alone,) = report_of(folder, tmp_path, "--prompt", "ab", "--seed", seed, *sampled)["results"]
        assert alone["tokens"] == both[number]["tokens"]
    assert both[0]["tokens"] != both[1]["tokens"]


def test_text_is_streamed_into_a_pipe_from_the_left(folder, tmp_path, capsys):
    quiet = report_of(folder, tmp_path, "--prompt", PROMPT, *SIZES)
    capsys.readouterr()
    streamed = report_of(folder, tmp_path, "--prompt", PROMPT, "--stream", *SIZES)
    assert [result["tokens"] for result in streamed["results"]] == [result["tokens"] for result in quiet["results"]]
    printed = capsys.readouterr().out
    assert printed.startswith(PROMPT + streamed["results"][0]["text"].rstrip("\ufffd"))
    assert printed.count(PROMPT) == 1


def test_infill_through_the_command_line(folder, tmp_path, capsys):
    report = report_of(
        folder, tmp_path, "--infill", "--mask-run", "3", "--prompt", "ab<|mask|>cd<|mask|>", "--block-length", "4"
    )  # fmt: skip
    (result,) = report["results"]
    assert len(result["tokens"]) == 10 and MASK not in result["tokens"] and result["committed"] == 6
    assert result["text"].startswith("ab") and "cd" in result["text"]
    assert result["text"] in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--gen-length", "20", "--block-length", "8"), "gen_length must be a multiple of block_length=8, got 20"),
        (("--gen-length", "64"), "a prompt with its new tokens must have at most 64 positions, got 66"),
        (("--gen-length", "2048", "--block-length", "2048"), "block_length must be 1 to 1024, got 2048"),
        (("--infill",), "--infill: prompt 0 has no mask token \\(its id is 79\\)"),
        (("--prompt", "a<|mask|>"), "prompt 1 has the mask token; --infill decodes masks in a text"),
        (("--cuda-graph", *SIZES), "--cuda-graph needs a GPU and --cache dual, got cpu and none"),
        (("--json", "/dev/null/x.json"), "/dev/null/x.json: cannot be written"),
        (("--infill", "--gen-length", "8"), "--gen-length has no use with --infill"),
        (("--infill", "--no-early-stop"), "--no-early-stop has no use with --infill"),
        (("--mask-run", "5"), "--mask-run has no use without --infill"),
        (("--policy", "threshold", "--radius", "9"), "--radius has no use with --policy threshold"),
        (("--policy", "topk", "--threshold", "0.5"), "--threshold has no use with --policy topk"),
        (("--steps", "3"), "--steps has no use with --policy local_leap"),
        (("--gen-length", "2147483640", "--block-length", "8"), "at most 64 positions, got 2147483642"),
        (("--prompt", "a<|mask|>", "--infill", "--mask-run", "2147483647"), "prompt 0 has no mask token"),
    ],
)
def test_what_a_user_can_put_right_is_a_sentence(folder, capsys, arguments, message):
    command = ["localleap", "generate", "--model", str(folder), "--prompt", "ab", "--device", "cpu"]
    assert cli.main([*command, *arguments]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(message, said), said


def test_arguments_that_make_no_sense_alone(capsys):
    command = ["localleap", "generate", "--model", "x", "--prompt", "ab"]
    for arguments, message in (
        (("--policy", "leap"), ", ".join(f"'{name}'" for name in POLICIES[:3])),
        (("--threshold", "nan"), "must be a finite fp32 number, got nan"),
        (("--threshold", "1e300"), "must be a finite fp32 number, got 1e300"),
        (("--radius", "-1"), "must be at least 0 and at most 2147483647, got -1"),
        (("--radius", str(2**63)), "must be at least 0 and at most 2147483647"),
        (("--steps", str(2**63)), "must be at most 2147483647"),
        (("--seed", str(2**63)), "must be at least 0 and below 2^62"),
        (("--temperature", "-1"), "must be 0 to 1e30, got -1"),
        (("--temperature", "1e31"), "must be 0 to 1e30, got 1e31"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*command, *arguments])
        assert message.replace("'", "") in capsys.readouterr().err.replace("'", "")


def test_generated_text_is_printed_as_it_is(capsys):
    print_text("a[:heart:] :smile: \tx [bold]")
    assert capsys.readouterr().out == "a[:heart:] :smile: \tx [bold]\n"


def test_too_many_masks_for_the_model(folder, capsys):
    command = ["localleap", "generate", "--model", str(folder), "--prompt", "a<|mask|>", "--infill", "--device", "cpu"]
    assert cli.main([*command, "--mask-run", "2147483647"]) == 1
    assert "prompt 0 has more than the model's 64 positions" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_not_replaced(folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["localleap", "generate", "--model", str(folder), "--prompt", "ab", "--device", "cuda", *SIZES]
    assert cli.main(command) == 1
    assert "--device cuda: torch sees no GPU" in capsys.readouterr().err
    assert cli.main(["localleap", "bench", "--device", "cuda"]) == 1
    assert "--device cuda: torch sees no GPU" in capsys.readouterr().err


def test_a_tokenizer_of_another_model(folder, tmp_path, capsys):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    sizes = {name: 60 for name in ("vocab_size", "embedding_size") if name in config}
    ids = {"mask_token_id": 59, "eos_token_id": 58, "pad_token_id": 58}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes | ids))
    assert cli.main(["localleap", "generate", "--model", str(tmp_path), "--prompt", "<|x|>", "--device", "cpu"]) == 1
    assert "prompt 0 has token 78, and the model knows tokens below 60" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["llada"], indirect=True)
def test_as_a_program(folder):
    """As a user starts it, in a process of its own, with an end that a pipe reads."""
    command = [sys.executable, "-m", "tokenweave_models.cli", "localleap", "generate", "--model", str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--prompt", PROMPT, "--device", "cpu", "--stream", *SIZES],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PROMPT) and "forward passes" in done.stdout


# -------------------------------------------------------------------------------------------------------------- display


def decode(tokens: list[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


def test_a_draft_is_readable_from_the_left():
    text = "h\u00e9llo"
    tokens = list(text.encode())
    draft = display.Draft([tokens[0], *[None] * (len(tokens) - 1)], decode)
    assert draft.prefix() == "h" and draft.picture() == "h_____"
    draft.tokens[3:5] = tokens[3:5]
    assert draft.prefix() == "" and draft.picture() == "h__ll_"
    draft.tokens[1] = tokens[1]
    assert draft.prefix() == "", "half a character was printed"
    draft.tokens[2] = tokens[2]
    assert draft.prefix() == "\u00e9ll"
    draft.tokens[5] = tokens[5]
    assert draft.rest() == "o" and draft.picture() == text


def test_on_a_terminal_all_texts_are_redrawn(monkeypatch):
    import rich.console

    screen = io.StringIO()
    terminal = rich.console.Console(force_terminal=True, file=screen, width=40, highlight=False)
    monkeypatch.setattr(display, "console", lambda: terminal)
    drafts = [display.Draft([97, None, None], decode), display.Draft([None, 98], decode)]
    with display.Live(drafts) as live:
        assert not live.has_printed
        assert "a__" in screen.getvalue() and "_b" in screen.getvalue()
        live.update([Commit(0, 2, 99), Commit(1, 0, 100)])
        assert "a_c" in screen.getvalue() and "db" in screen.getvalue()


# ---------------------------------------------------------------------------------------------------------------- bench


def test_bench_times_model_and_selector_by_policy_and_cache(tmp_path, capsys):
    path = tmp_path / "bench.json"
    command = ["localleap", "bench", "--device", "cpu", "--layers", "1", "--hidden", "128", "--vocab", "100"]
    sizes = ["--prompt-length", "4", *SIZES, "--batch", "2", "--dtype", "fp32"]
    policies = ["--policies", "local_leap,topk,klass", "--caches", "none,dual"]
    assert cli.main([*command, *sizes, *policies, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    rows = {(row["cache"], row["policy"]): row for row in report["rows"]}
    assert set(rows) == {(c, p) for c in ("none", "dual") for p in ("local_leap", "topk", "klass", "published")}
    assert all(row["model_ms"] > 0 and row["selector_ms"] > 0 for row in rows.values())
    assert report["published_has_same_tokens"] == {"none": True, "dual": True}
    for cache in ("none", "dual"):
        assert rows[cache, "topk"]["steps"] == 16
        assert rows[cache, "published"]["steps"] == rows[cache, "local_leap"]["steps"]
    printed = capsys.readouterr().out
    assert "selector ms" in printed and "dual, published" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--hidden", "100"), "--hidden must be a multiple of 128 for llada-8b, got 100"),
        (("--preset", "dream-7b", "--hidden", "1024"), "--hidden must be a multiple of 896 for dream-7b, got 1024"),
        (("--layers", "-1"), "--layers must be at least 0, got -1"),
        (("--vocab", "1"), "--vocab must be 0 or at least 2, got 1"),
        (("--gen-length", "30"), "gen_length must be a multiple of block_length=32, got 30"),
        (("--model", "x", "--layers", "7"), "--layers has no use with --model"),
        (("--cuda-graph",), "--cuda-graph needs a GPU"),
    ],
)
def test_bench_refuses(arguments, message, capsys):
    assert cli.main(["localleap", "bench", "--device", "cpu", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_bench_knows_its_policies(capsys):
    with pytest.raises(SystemExit):
        cli.main(["localleap", "bench", "--policies", "local_leap,leap"])
    assert "must be some of topk, threshold" in capsys.readouterr().err


def test_the_published_selector_is_the_reference():
    """On rows of a model, and on positions of which some are known and some rows are in another order."""
    model = sharp_model(CONFIG)
    tokens = some_tokens(2, 24) % 70
    tokens[:, 8:24] = tokens[:, 8:24].masked_fill(
        torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) < 0.8, MASK
    )
    with torch.no_grad():
        logits = model(tokens).float().flatten(0, 1)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(1))
    rows = order.argsort().view(2, 24)[:, 8:24]
    requests = DecodeRequests.make(2, 16, threshold=0.5, relaxed_threshold=0.2, radius=1, block_start=8)
    ours, theirs = tokens.clone(), tokens.clone()
    found = published_selector(logits[order], ours, requests, mask_id=MASK, rows=rows)
    counts, committed, candidates, _ = reference.decode_step_(logits[order], theirs, requests, mask_id=MASK, rows=rows)
    assert torch.equal(ours, theirs) and torch.equal(found.counts, counts) and torch.equal(found.committed, committed)
    assert torch.equal(found.candidates[committed], candidates[committed])
    assert 1 < int(committed[0].sum()) < int((tokens[0] == MASK).sum())
