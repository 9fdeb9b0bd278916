"""What the command line refuses: one sentence that names the field and what may stand there; and what it warns of."""

import json

import pytest
import torch
from tokenweave_models import cli
from tokenweave_models.densification.runner import main

PLANE = "ms:1.5@10m,4"
DISC = "ms:0@10m,4;rinf=1km"
SWEEP = {"--path-loss": PLANE, "--densities": "1e3/km2", "--thresholds": "0dB", "--n": "64", "--device": "cpu"}
REGIME = {"--path-loss": PLANE}


def run(command: str, given: dict[str, str | None]) -> int:
    words = [name if value is None else f"{name}={value}" for name, value in given.items()]
    return cli.main(["densification", command, *words])


def refused(capsys, command: str, given: dict) -> str:
    """The sentence, of which there is one, and no traceback."""
    assert run(command, given) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("tokenweave: ") and captured.err.count("\n") == 1
    return captured.err


def sweep_without(name: str, **more) -> dict:
    return {key: value for key, value in SWEEP.items() if key != name} | more


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"--densities": "1e3"}, ["--densities", "/km2", "unit is missing"]),
        ({"--densities": "0,1/km2"}, ["--densities", "positive"]),
        ({"--densities": "-1/km2"}, ["--densities", "positive"]),
        ({"--densities": "nan/km2"}, ["--densities", "finite"]),
        ({"--densities": "inf/km2"}, ["--densities", "finite"]),
        ({"--densities": "1e999/km2"}, ["--densities", "finite"]),
        ({"--densities": "1e-22/km2"}, ["densities_per_km2", "a square of 10 m", "1e-25 to 1e+25"]),
        ({"--densities": "5:1:9/km2"}, ["--densities", "LOW < HIGH"]),
        ({"--thresholds": "1"}, ["--thresholds", "unit is missing"]),
        ({"--thresholds": "0x"}, ["--thresholds", "positive"]),
        ({"--thresholds": "200dB"}, ["--thresholds", "-180 to 180 dB"]),
        ({"--thresholds": "1dB,2x"}, ["--thresholds", "do not mix"]),
        ({"--path-loss": "ms:-1@10m,4"}, ["--path-loss", "exponents", "0 to 100"]),
        ({"--path-loss": "ms:4@10m,3"}, ["--path-loss", "exponents", "increasing"]),
        ({"--path-loss": "slope:2"}, ["--path-loss", "last exponent", "above 2"]),
        ({"--path-loss": "ms:0@10m,1@5m,4"}, ["--path-loss", "breakpoints_m", "increasing"]),
        ({"--path-loss": "ms:0@0m,4"}, ["--path-loss", "breakpoints_m", "positive"]),
        ({"--path-loss": "ms:0@10,4"}, ["--path-loss", "unit is missing"]),
        ({"--path-loss": "slope:4;h=-1m"}, ["--path-loss", "h=", "not negative"]),
        ({"--path-loss": "ms:0@10m,4;rinf=5m"}, ["--path-loss", "r_inf_m", "above the last breakpoint"]),
        ({"--fading": "pareto:0.5", "--path-loss": "slope:4"}, ["fading", "tail index above", "r_inf_m"]),
        ({"--fading": "gamma:0"}, ["--fading", "k must be 0.01 to 1000"]),
        ({"--fading": "weibull:-1"}, ["--fading", "k must be 0.01 to 30"]),
        ({"--fading": "pareto:0"}, ["--fading", "alpha must be 0.001 to 100"]),
        ({"--fading": "lognormal:-1dB"}, ["--fading", "db must be 0 to 300"]),
        ({"--fading": "lognormal:8"}, ["--fading", "unit is missing"]),
        ({"--fading": "fog"}, ["--fading", "rayleigh"]),
        ({"--fading": "logpareto:1", "--path-loss": DISC}, ["--fading", "E ln(1 + mark) is infinite", "--no-rate"]),
        ({"--noise": "-1x"}, ["--noise", "not negative"]),
        ({"--noise": "-92dBm"}, ["--noise", "needs the transmit power"]),
        ({"--noise": "1e-9"}, ["--noise", "-92dBm"]),
        ({"--transmit-power": "30dBm"}, ["--transmit-power", "no use"]),
        ({"--noise": "-92dBm", "--transmit-power": "30"}, ["--transmit-power", "unit is missing"]),
        ({"--target-se": "1e-3"}, ["--n and --target-se exclude each other"]),
        ({"--relative": None}, ["--relative", "no use without --target-se"]),
        ({"--checkpoint": "a.npz", "--out": "a.npz"}, ["--checkpoint must be another file than --out"]),
        ({"--noise": "4000dB"}, ["--noise", "beyond what numbers hold"]),
        ({"--activity": "0.01"}, ["num_terms", "activity 0.01"]),
        ({"--most": "1e6"}, ["--most", "no use without --target-se"]),
        ({"--association": "nearest", "--method": "power"}, ["method must be geometry", "distances"]),
        ({"--method": "geometry", "--fading": "pareto:0.9", "--path-loss": DISC}, ["finite mean", "method power"]),
        ({"--method": "conditional", "--fading": "gamma:2"}, ["needs Rayleigh fading"]),
        ({"--method": "exact"}, ["--n", "no use with --method exact"]),
        ({"--num-points": "64"}, ["--num-points has no use with method power"]),
        ({"--num-terms": "16", "--method": "geometry"}, ["--num-terms has no use with method geometry"]),
        ({"--rate-nodes": "0", "--method": "geometry"}, ["--rate-nodes has no use with method geometry"]),
        ({"--residual": "mean", "--method": "conditional", "--no-rate": None}, ["--residual has no use"]),
        ({"--num-terms": "5"}, ["num_terms must be a multiple of 4"]),
        ({"--rate-nodes": "17"}, ["rate_nodes must be 0 to 16"]),
        ({"--out": "run.txt"}, ["--out must end in .npz, .csv, .json"]),
        ({"--plot": "run.pdf"}, ["--plot must end in .png"]),
        ({"--checkpoint": "run.json"}, ["--checkpoint must end in .npz"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_sweep_is_refused_in_a_sentence(capsys, given, words):
    sentence = refused(capsys, "sweep", SWEEP | given)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"--n": "0"}, "must be a whole number from 1 to 2^53"),
        ({"--n": "1e17"}, "must be a whole number from 1 to 2^53"),
        ({"--n": "2.5"}, "must be a whole number from 1 to 2^53"),
        ({"--target-se": "0"}, "must be above 0"),
        ({"--activity": "0"}, "must be above 0 and at most 1"),
        ({"--seed": "-1"}, "must be at least 0"),
        ({"--residual": "cauchy"}, "gauss"),
        ({"--device": "tpu"}, "cuda"),
    ],
    ids=str,
)
def test_plain_numbers_and_names_are_refused_at_once(capsys, given, words):
    with pytest.raises(SystemExit) as ended:
        run("sweep", SWEEP | given)
    assert ended.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["sweep", "ccdf"])
def test_a_gpu_that_is_not_there_is_no_reason_to_take_the_cpu(capsys, command):
    assert "--device cuda: torch sees no GPU" in refused(capsys, command, SWEEP | {"--device": "cuda"})


def test_formulas_for_thresholds_of_at_least_0_db_refuse_smaller_ones(capsys):
    given = {"--path-loss": PLANE, "--densities": "1e3/km2", "--thresholds": "-3dB"}
    assert "at least 0 for method exact" in refused(capsys, "exact", given)
    assert "Rayleigh fading only" in refused(
        capsys, "exact", given | {"--association": "nearest", "--fading": "gamma:2"}
    )


def test_files_that_cannot_be_written_are_refused_before_the_run(capsys, tmp_path):
    (tmp_path / "file").touch()
    for option, name in (("--out", "a.npz"), ("--plot", "a.png"), ("--checkpoint", "a.npz")):
        assert "cannot be written" in refused(capsys, "sweep", SWEEP | {option: str(tmp_path / "file" / name)})


def test_a_checkpoint_of_another_run_is_refused(capsys, tmp_path):
    given = SWEEP | {"--checkpoint": str(tmp_path / "run.npz"), "--n": "16384"}
    assert run("sweep", given) == 0
    capsys.readouterr()
    assert "of the same sweep" in refused(capsys, "sweep", given | {"--seed": "8"})


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("1 0.9\n2 0.1\n", "must begin with 1"),  # not normalised
        ("0 1\n", "at least 2 lines"),
        ("0 1\n1 0.5\n", "positive"),  # a mark of 0
        ("1 1\n2 x\n", "line 2"),
        ("1 1\n2 1\n", "strictly decreasing"),
    ],
)
def test_fading_tables_that_are_no_law(capsys, tmp_path, table, words):
    path = tmp_path / "marks.txt"
    path.write_text(table)
    sentence = refused(capsys, "regime", REGIME | {"--fading": f"table:{path}"})
    assert "--fading" in sentence and words in sentence


def test_warnings_are_said_and_do_not_stop_a_run(capsys):
    assert run("regime", REGIME | {"--path-loss": "ms:2@10m,4"}) == 0
    assert "Warning: rho = 1: limits are approached logarithmically" in capsys.readouterr().out
    sparse = SWEEP | {"--path-loss": "ms:0@10m,4;rinf=100m", "--densities": "10/km2"}
    assert run("sweep", sparse | {"--no-rate": None}) == 0
    assert "73.0% of realisations at 10/km2 have no base station" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"--quantity": "ase", "--threshold": "0dB"}, ["--threshold", "no use with --quantity ase"]),
        ({"--quantity": "coverage"}, ["needs a --threshold"]),
        ({"--quantity": "coverage", "--threshold": "0,1dB"}, ["--threshold must be one number"]),
        ({"--range": "1e3/km2"}, ["--range must be two densities"]),
        ({"--range": "1e3,1/km2"}, ["range_per_km2", "ascending"]),
        ({"--range": "1,1e3"}, ["--range", "unit is missing"]),
        ({"--fading": "logpareto:1", "--path-loss": DISC}, ["E ln(1 + mark) is infinite"]),
        ({"--num-points": "64"}, ["--num-points has no use with method power"]),
    ],
    ids=str,
)
def test_an_optimum_is_refused_in_a_sentence(capsys, given, words):
    sentence = refused(capsys, "optimum", {"--path-loss": PLANE, "--range": "1,1e3/km2", "--n": "64"} | given)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"--near-exponents": "1,0"}, "--near-exponents must be ascending numbers from 0 to 4"),
        ({"--near-exponents": "5"}, "--near-exponents must be ascending numbers from 0 to 4"),
        ({"--tail-indices": "x"}, "--tail-indices must be ascending numbers"),
        ({"--densities": "1,2,3/km2"}, "--densities must be at least 3 over two decades"),
        ({"--threshold": "0,1dB"}, "--threshold must be one number"),
        ({"--num-points": "64"}, "--num-points has no use with method power"),
    ],
    ids=str,
)
def test_a_phase_diagram_is_refused_in_a_sentence(capsys, given, words):
    assert words in refused(capsys, "phase", {"--n": "64"} | given)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "must be an object with path_loss"),
        ('{"fading": "rayleigh"}', "must be an object with path_loss"),
        (json.dumps({"path_loss": "slope:4", "colour": "red"}), "only, got colour"),
        (json.dumps({"path_loss": 4}), "path_loss must be a text, got 4"),
        (json.dumps({"path_loss": "slope:4", "activity": "all"}), "activity must be a number, got 'all'"),
        (json.dumps({"path_loss": "slope:4", "fading": "gamma:0"}), "k must be 0.01 to 1000"),
        (json.dumps({"path_loss": "slope:4", "activity": 2}), "activity must be above 0"),
    ],
)
def test_a_network_in_a_file_is_refused_with_the_files_name(capsys, tmp_path, text, words):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps({"path_loss": "slope:4"}))
    if text is not None:
        bad.write_text(text)
    assert cli.main(["densification", "order", str(good), str(bad), "--densities=1/km2", "--n=64"]) == 1
    sentence = capsys.readouterr().err
    assert "bad.json: " in sentence and words in sentence and sentence.count("\n") == 1


def test_reliabilities_over_geometries_need_the_conditional_method(capsys):
    given = {"--path-loss": PLANE, "--densities": "1e3/km2", "--n": "64", "--meta": None}
    assert "--meta needs --method conditional" in refused(capsys, "ccdf", given | {"--method": "power"})
    assert "needs Rayleigh" in refused(capsys, "ccdf", given | {"--fading": "gamma:2"})


def test_scipy_missing_is_said_with_its_cure(capsys, monkeypatch):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.setattr(main, "import_module", import_module)
    assert "scipy is not installed; run: pip install" in refused(capsys, "regime", REGIME)


def test_other_commands_refuse_too(capsys, tmp_path):
    assert "--only must be a word of one of: saturation" in refused(capsys, "verify", {"--only": "weather"})
    assert "--n must be at least 10000" in refused(capsys, "verify", {"--n": "10"})
    assert "--exponent must be above 2" in refused(capsys, "bench", {"--exponent": "2"})
    assert "--far-exponent must be above 2 and finite, got nan" in refused(capsys, "phase", {"--far-exponent": "nan"})
    (tmp_path / "file").touch()
    assert "cannot be made" in refused(capsys, "reproduce", {"--folder": str(tmp_path / "file"), "--figures": "F2"})
