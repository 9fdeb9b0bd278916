"""`tokenweave demo` and `tokenweave info` as a user types them."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch
from tokenweave_models import cli
from tokenweave_models.common.errors import UserError
from tokenweave_models.common.ranks import RankFailed, usable_cores
from tokenweave_models.tokenweave import demo, demo_ranks

from tokenweave_ops import info

TINY = ["--device", "cpu", "--hidden", "64", "--layers", "2", "--heads", "4", "--kv-heads", "2"]
TINY += ["--batch", "2", "--seq", "24", "--passes", "3"]


def tokenweave(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "tokenweave_models.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


def test_demo_from_end_to_end(tmp_path):
    done = tokenweave("demo", *TINY, "--no-bench", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("eager add + norm", "add_rms_norm_", "ms / layer", "error of logits", "same next byte", "ln(256)"):
        assert words in done.stdout
    result = json.loads((tmp_path / "model.json").read_text())
    assert result["config"]["hidden"] == 64
    assert result["tokens"] == 48
    assert result["dtype"] == "bf16"
    eager, fused = result["modes"]["reference"], result["modes"]["fused"]
    assert 0 < fused["norms_ms"] < fused["layer_ms"]
    assert 0 < eager["norms_ms"] < eager["layer_ms"]
    assert eager["passes"] == fused["passes"] == 3
    # bf16 is visibly not float64, and our op is not worse than eager by more than the kernels' own bound.
    assert 0 < fused["max_error"] <= 2 * eager["max_error"] + 4 * 2**-8 * result["logit_std"] * 4
    assert result["max_difference"] <= fused["max_error"] + eager["max_error"]
    assert result["same_next_byte"] > 0.9
    assert result["float64_cross_entropy"] == pytest.approx(5.545, abs=0.2)

    if usable_cores() < 2:
        assert "No tensor-parallel run: 2 processes need as many cores, and this one may use 1." in done.stdout
        return
    for words in ("2 processes, all_reduce, add_rms_norm_", "2 processes, allreduce_rmsnorm_", "sum + add + norm"):
        assert words in done.stdout
    assert "2 processes, emulated link, weave" in done.stdout
    over_ranks = json.loads((tmp_path / "tensor_parallel.json").read_text())
    rows = over_ranks["rows"]
    assert rows["one_process"]["layer_ms"] == fused["layer_ms"]
    assert rows["one_process"]["max_error"] == fused["max_error"]
    for mode in demo_ranks.MODES:
        assert 0 < rows[mode]["norms_ms"] < rows[mode]["layer_ms"]
        # Each of two partial sums and their total are rounded where one process rounds once.
        assert 0 < rows[mode]["max_error"] <= 3 * fused["max_error"] + 4 * 2**-8 * result["logit_std"] * 4
        assert rows[mode]["same_next_byte"] > 0.9
    assert over_ranks["passes"] == 3
    assert over_ranks["max_difference"] <= rows["reference"]["max_error"] + rows["fused"]["max_error"]
    assert over_ranks["ranks_hold_the_same_bits"] is True
    link = over_ranks["emulated_link"]
    assert link["link_ms"] > 0
    saved_ms = rows["fused_link"]["layer_ms"] - rows["weave_link"]["layer_ms"]
    assert link["hidden_share"] == pytest.approx(saved_ms / link["link_ms"])


def options(*arguments):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args([*TINY, "--ranks", "1", *map(str, arguments)])


def test_no_tensor_parallel_run_without_its_means(monkeypatch):
    cpu = torch.device("cpu")
    assert demo_ranks.why_not(1, cpu) == "--ranks 1 was asked for."
    assert "--device cpu" in demo_ranks.why_not(2, torch.device("cuda"))
    monkeypatch.setattr(demo_ranks, "usable_cores", lambda: 1)
    assert demo_ranks.why_not(2, cpu) == "2 processes need as many cores, and this one may use 1."
    monkeypatch.setattr(demo_ranks, "usable_cores", lambda: 2)
    assert demo_ranks.why_not(2, cpu) is None
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    assert demo_ranks.why_not(2, cpu) == "this torch was built without gloo."


def test_ranks_that_cannot_share_memory_are_a_sentence_and_the_demo_goes_on(checkout, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_ranks, "usable_cores", lambda: 2)
    monkeypatch.setattr(demo_ranks, "run_ranks", lambda *_, **__: ["rank 0 may not map it", "rank 0 may not map it"])
    demo.run(options("--ranks", 2, "--output", tmp_path / "out"))
    assert "No tensor-parallel run: rank 0 may not map it" in capsys.readouterr().out
    assert (checkout / "plot.called").exists()


def test_a_workspace_that_cannot_be_is_that_sentence(monkeypatch):
    def refuse(*_, **__):
        raise demo_ranks.tokenweave_ops.CommunicationError("no /proc here")

    monkeypatch.setattr(demo_ranks.tokenweave_ops, "Workspace", refuse)
    tokens = torch.zeros(1, 4, dtype=torch.int64).numpy()
    config = demo_ranks.ModelConfig(hidden=64)
    assert demo_ranks.run_modes(None, None, config, 0, torch.bfloat16, tokens, 1) == "no /proc here"


def test_a_rank_that_fails_ends_the_demo(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RankFailed("rank 1: killed by SIGKILL")

    monkeypatch.setattr(demo_ranks, "usable_cores", lambda: 2)
    monkeypatch.setattr(demo_ranks, "run_ranks", fail)
    assert cli.main(["demo", *TINY, "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "tokenweave: tensor-parallel run: rank 1: killed by SIGKILL\n"


def test_targets_are_the_bytes_that_follow():
    tokens, targets = demo.next_byte_task(torch.arange(100), batch=2, seq=3)
    assert tokens.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert targets.tolist() == [[1, 2, 3], [4, 5, 6]]
    tokens, targets = demo.next_byte_task(torch.arange(4), batch=1, seq=6)  # too short: repeated
    assert (tokens.tolist(), targets.tolist()) == ([[0, 1, 2, 3, 0, 1]], [[1, 2, 3, 0, 1, 2]])


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout whose bench only writes down how it was called."""
    root = tmp_path / "checkout"
    (root / "bench").mkdir(parents=True)
    (root / "README.md").write_text("Fewer bytes than are wanted.")
    for name in ("run", "plot"):
        (root / "bench" / f"{name}.py").write_text(
            f"import pathlib, sys\npathlib.Path('{name}.called').write_text(' '.join(sys.argv[1:]))\n"
        )
    monkeypatch.setattr(demo, "find_checkout", lambda: root)
    return root


def test_demo_runs_the_bench_and_draws_its_plot(checkout, tmp_path, capfd):
    demo.run(options("--output", tmp_path / "out"))
    json_path, png_path = tmp_path / "out" / "bench.json", tmp_path / "out" / "bench.png"
    called = (checkout / "run.called").read_text()
    assert "--quick" in called
    assert "--device cpu" in called
    assert f"--json {json_path}" in called
    called = (checkout / "plot.called").read_text()
    assert str(json_path) in called
    assert str(png_path) in called
    printed = capfd.readouterr().out
    assert str(png_path) in printed
    assert "is repeated" in printed


def test_demo_stops_when_the_bench_fails(checkout, tmp_path):
    (checkout / "bench" / "run.py").write_text("raise SystemExit(3)")
    with pytest.raises(UserError, match=r"bench/run\.py ended with exit status 3"):
        demo.run(options("--output", tmp_path / "out"))
    assert not (checkout / "plot.called").exists()


def test_demo_without_a_checkout_says_where_the_bench_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_checkout", lambda: None)
    demo.run(options("--output", tmp_path))
    printed = capsys.readouterr().out
    assert "the package's own Python source" in printed
    assert "The bench is in the source checkout" in printed


def test_info_is_the_ops_packages_info(capsys):
    assert cli.main(["info", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["backends"] == info.collect()["backends"]
    assert cli.main(["info"]) == 0
    assert printed["torch"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "the following arguments are required: command"),
        (["dance"], 2, "invalid choice: 'dance'"),
        (["demo", "--dtype", "int8"], 2, "argument --dtype: invalid choice: 'int8'"),
        (["demo", "--seq", "0"], 2, "argument --seq: must be at least 1, got 0"),
        (["demo", "--seq", "many"], 2, "argument --seq: invalid positive value: 'many'"),
        (["demo", "--device", "cpu", "--heads", "3"], 1, "tokenweave: ModelConfig: hidden must be a multiple of"),
        (["demo", "--ranks", "3"], 1, "num_heads=16, world_size=3; --ranks sets the world size, 1 leaves ranks out"),
        (["demo", "--ranks", "32", "--heads", "32", "--kv-heads", "32"], 1, "must be 1 to 16, got 32; --ranks"),
        (["demo", "--hidden", "36", "--heads", "2", "--kv-heads", "2"], 1, "hidden must be a multiple of 8 from"),
    ],
)
def test_bad_arguments_are_sentences(arguments, status, message, capsys, monkeypatch):
    monkeypatch.setattr(demo_ranks, "usable_cores", lambda: 32)
    try:
        returned = cli.main(arguments)
    except SystemExit as exit:  # argparse's own way out
        returned = exit.code
    assert returned == status
    assert message in capsys.readouterr().err


def test_ctrl_c_is_a_word(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "tokenweave: interrupted\n"


def test_asking_for_a_missing_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["demo", "--device", "cuda"]) == 1
    assert capsys.readouterr().err == "tokenweave: --device cuda: torch sees no GPU; `tokenweave info` says more\n"


def test_an_output_folder_that_cannot_be(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert cli.main(["demo", *TINY, "--output", str(file)]) == 1
    assert f"tokenweave: --output {file}: cannot make this folder" in capsys.readouterr().err


def test_without_kernels_it_says_so(tmp_path):
    done = tokenweave("demo", *TINY, "--output", tmp_path, TOKENWEAVE_LIBRARY_DIR=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("tokenweave: the compiled ops do not run on cpu: rms_norm: no cpu kernels")
    assert "Traceback" not in done.stderr


def test_without_rich_it_says_so(tmp_path):
    (tmp_path / "rich.py").write_text("raise ImportError('none here')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = tokenweave("demo", *TINY, "--output", tmp_path, PYTHONPATH=path)
    assert done.returncode == 1
    assert done.stderr == "tokenweave: rich is not installed; run: pip install 'tokenweave-ops[models]'\n"


def test_auto_falls_back_to_the_cpu_when_the_gpu_has_no_kernels(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(demo, "why_not", lambda device, dtype: "too old" if device.type == "cuda" else None)
    assert demo.choose_device("auto", torch.bfloat16) == torch.device("cpu")
    assert "the ops do not run on it, so this runs on the CPU: too old" in capsys.readouterr().out
    with pytest.raises(UserError, match="the compiled ops do not run on cuda: too old"):
        demo.choose_device("cuda", torch.bfloat16)
