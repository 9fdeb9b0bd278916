"""`tokenweave densification ...` as a user starts it: what it prints and writes is what the library computes."""

import csv
import json
import subprocess
import sys
from math import inf
from pathlib import Path

import numpy as np
import pytest
from tokenweave_models import cli
from tokenweave_models.densification import benchmark, samplers
from tokenweave_models.densification.exact import nearest, saturation, strongest
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.path_loss import MultiSlope
from tokenweave_models.densification.result import Result
from tokenweave_models.densification.runner import bench, ccdf, figures, laws, reporting
from tokenweave_models.densification.runner.checks import Check
from tokenweave_models.densification.sweep import sweep
from tokenweave_models.densification.units import parse_fading

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

BATCH = 16384
DUAL = "ms:1.5@10m,4"
PNG = b"\x89PNG\r\n\x1a\n"


def run(command: str, *words: str) -> None:
    assert cli.main(["densification", command, *words]) == 0


def run_on_cpu(command: str, *words: str) -> None:
    run(command, *words, "--device=cpu")


# --------------------------------------------------------------------------------------------------------------- sweep


def test_a_sweep_is_the_librarys_with_where_it_is_from(tmp_path, capsys):
    npz, table, report, plot = (tmp_path / f"run.{end}" for end in ("npz", "csv", "json", "png"))
    run_on_cpu(
        "sweep", f"--path-loss={DUAL}", "--fading=rayleigh*lognormal:8dB", "--densities=1e2:1e4:3/km2",
        "--thresholds=-5:5:5dB", "--noise=-92dBm", "--transmit-power=30dBm", "--n=2e4", "--seed=3", f"--out={npz}",
        f"--out={table}", f"--out={report}", f"--plot={plot}",
    )  # fmt: skip
    network = Network(MultiSlope([1.5, 4], [10.0]), parse_fading("rayleigh*lognormal:8dB"), noise=10**-12.2)
    wanted = sweep(network, [1e2, 1e3, 1e4], [-5, 0, 5], num_realisations=20000, seed=3)
    found = Result.load(npz)
    np.testing.assert_array_equal(found.coverage, wanted.coverage)
    np.testing.assert_array_equal(found.rate_nats, wanted.rate_nats)
    assert found.provenance["seed"] == 3 and found.provenance["num_realisations"] == 20000
    command = found.provenance["command"]
    assert command.startswith("tokenweave densification sweep --path-loss=ms:1.5@10m,4 ")
    assert "--n=20000 " in command and "--noise=-92dBm" in command and found.provenance["date"].startswith("20")
    rows = list(csv.DictReader(line for line in table.read_text().splitlines() if not line.startswith("#")))
    assert float(rows[4]["coverage"]) == wanted.coverage[1, 1] and len(rows) == 9
    assert json.loads(report.read_text())["ase"] == wanted.ase.tolist()
    assert plot.read_bytes().startswith(PNG)
    printed = capsys.readouterr().out
    assert reporting.with_error(wanted.coverage[1, 1], wanted.coverage_se[1, 1]) in printed
    assert reporting.with_error(wanted.ase[2], wanted.ase_se[2]) in printed
    assert "20000/20000" in printed and "Warning: rho = 1.333 is close to 1" in printed


def test_the_command_in_the_provenance_gives_the_run_again(tmp_path):
    first, second = tmp_path / "first.npz", tmp_path / "second.npz"
    run_on_cpu("sweep", f"--path-loss={DUAL}", "--densities=1e3/km2", "--n=2000", "--no-rate", f"--out={first}")
    words = Result.load(first).provenance["command"].split()
    assert cli.main([word.replace("first.npz", "second.npz") for word in words[1:]]) == 0
    np.testing.assert_array_equal(Result.load(first).coverage, Result.load(second).coverage)


def test_a_target_error_is_reached_and_a_run_is_gone_on_from(tmp_path, capsys):
    kept, out = tmp_path / "kept.npz", tmp_path / "out.npz"
    words = f"--path-loss={DUAL}", "--densities=1e3,1e4/km2", "--no-rate", f"--out={out}", f"--checkpoint={kept}"
    run_on_cpu("sweep", *words, f"--n={3 * BATCH}")
    run_on_cpu("sweep", *words, "--target-se=5e-4")
    result = Result.load(out)
    assert result.coverage_se.max() <= 5e-4 and result.provenance["num_realisations"] == 8 * BATCH
    whole = sweep(
        Network(MultiSlope([1.5, 4], [10.0]), parse_fading("rayleigh")), [1e3, 1e4], [0], num_realisations=8 * BATCH,
        rate=False, seed=7,
    )  # fmt: skip
    np.testing.assert_array_equal(result.coverage, whole.coverage)
    run_on_cpu("sweep", *words, "--target-se=1e-9", f"--most={8 * BATCH}")
    assert "Warning: the target error 1e-09 was not reached" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ formulas and regimes


def test_exact_prints_formulas_and_their_limits(capsys):
    run("exact", "--path-loss=slope:4", "--densities=1,1e3/km2", "--thresholds=-10,0dB")
    printed = capsys.readouterr().out
    coverage = saturation.coverage(0.5, [0.1, 1.0])
    assert f"{coverage[0]:.6g}" in printed and f"{coverage[1]:.6g}" in printed and "1.60062" in printed
    run("exact", "--path-loss=ms:0@10m,4", "--densities=1e6/km2")
    network = Network(MultiSlope([0, 4], [10.0]), parse_fading("rayleigh"))
    share = strongest.mean_share(network.power_measure, float(network.scaled_density([1e6])[0]))
    printed = capsys.readouterr().out
    assert reporting.plain(share) in printed and "E[M] / E[S]" in printed  # brackets are not taken for a style


def test_exact_knows_the_limits_of_the_nearest_cell(capsys):
    common = "--densities=1e8/km2", "--association=nearest", "--no-rate"
    run("exact", "--path-loss=ms:3@10m,4", *common)
    assert "0.3743" in capsys.readouterr().out  # 1 / (1 + F(1, 3))
    run("exact", "--path-loss=ms:1.5@10m,4", *common)
    one = Network(MultiSlope([1.5, 4], [10.0]), parse_fading("rayleigh"))
    limit = nearest.high_density_coverage(one.path_loss, one.power_measure.mean_power, 1e4, 1.0)
    assert f"{limit:.4g}" in capsys.readouterr().out
    run("exact", "--path-loss=slope:4;h=10m", *common)
    assert f"{(4 - 2) / (2 * np.pi * 100) / 1e2:.4g}" in capsys.readouterr().out


def test_regime_says_index_exponents_and_moments(tmp_path, capsys):
    run("regime", "--path-loss=ms:1@10m,4", "--fading=pareto:1.5", f"--json={tmp_path / 'regime.json'}")
    printed = capsys.readouterr().out
    assert "deficit" in printed and "density^-0.5" in printed and "E[m]" in printed
    found = json.loads((tmp_path / "regime.json").read_text())
    assert found["regime"]["rho"] == 1.5 and found["network"]["path_loss"] == "ms:1@10m,4"
    run("regime", "--path-loss=slope:4;rinf=1km", "--fading=logpareto:1", f"--json={tmp_path / 'regime.json'}")
    assert "E ln(1 + m) is infinite" in capsys.readouterr().out
    assert json.loads((tmp_path / "regime.json").read_text())["regime"]["exponents"]["rate"] is None  # nan


# ---------------------------------------------------------------------------------------- distribution, optimum, order


def test_ccdf_prints_quantiles_beside_those_of_the_limit(tmp_path, capsys):
    run_on_cpu("ccdf", "--path-loss=slope:4", "--densities=1,10/km2", "--n=1e5", f"--plot={tmp_path / 'a.png'}")
    rows = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    medians = {row[0]: float(row[2]) for row in rows if len(row) == 4}
    assert set(medians) == {"1 /km2", "10 /km2", "limit"}
    assert max(medians.values()) - min(medians.values()) < 0.03  # one law at every density, and its own limit
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_a_level_is_found_between_thresholds():
    x, y = np.array([10.0, 0.0, -10.0]), np.array([0.1, 0.5, 0.9])
    assert ccdf.level_db(x, y, 0.7) == pytest.approx(-5.0)
    assert np.isnan(ccdf.level_db(x, y, 0.95))


def test_meta_gives_shares_of_geometries(tmp_path, capsys):
    run_on_cpu(
        "ccdf", "--path-loss=slope:4", "--densities=1/km2", "--association=nearest", "--thresholds=0dB", "--n=1e5",
        "--meta", f"--plot={tmp_path / 'a.png'}", f"--out={tmp_path / 'a.npz'}",
    )  # fmt: skip
    histogram = Result.load(tmp_path / "a.npz").histogram[0, 0]
    share = histogram[128:].sum() / histogram.sum()
    assert f"{share:.4f}" in capsys.readouterr().out and 0.5 < share < 0.6
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_the_best_density_with_its_interval(tmp_path, capsys):
    report, plot = tmp_path / "best.json", tmp_path / "best.png"
    run_on_cpu(
        "optimum", f"--path-loss={DUAL}", "--quantity=coverage", "--threshold=0dB", "--range=1,1e5/km2",
        "--noise=-84dB", f"--n={BATCH * 2}", f"--json={report}", f"--plot={plot}",
    )  # fmt: skip
    found = json.loads(report.read_text())
    assert found["kind"] == "interior" and found["density_low"] < found["density_per_km2"] < found["density_high"]
    printed = capsys.readouterr().out
    assert 50 < found["density_per_km2"] < 250 and f"{found['density_per_km2']:.4g}" in printed
    assert f" {found['density_low']:.4g} to {found['density_high']:.4g} " in printed
    assert plot.read_bytes().startswith(PNG)
    run_on_cpu("optimum", f"--path-loss={DUAL}", "--range=1,1e5/km2", "--n=2000")
    assert "Verdict: area spectral efficiency rises" in capsys.readouterr().out


def test_order_reads_a_sweep_over_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("marks.txt").write_text("0.1 1\n1 0.5\n3 0.1\n10 0.01\n")
    words = "--path-loss=slope:4;rinf=200m", "--fading=table:marks.txt", "--densities=1e3/km2", "--n=64"
    run_on_cpu("sweep", *words, "--out=run.json")
    run_on_cpu("order", "run.json", "run.json", "--densities=1e3/km2", "--n=64", "--no-rate")
    assert "table:marks.txt" in capsys.readouterr().out


def test_order_reads_networks_and_a_sweeps_json(tmp_path, capsys):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps({"path_loss": "slope:4;rinf=200m", "fading": "gamma:0.5"}))
    words = "--path-loss=slope:4;rinf=200m", "--fading=gamma:4", "--densities=1e3/km2", "--n=64"
    run_on_cpu("sweep", *words, f"--out={b}")
    report, plot = tmp_path / "order.json", tmp_path / "order.png"
    given = "--densities=1e2,1e4/km2", "--thresholds=0dB", f"--n={BATCH * 2}", f"--json={report}", f"--plot={plot}"
    run_on_cpu("order", str(a), str(b), *given)
    found = json.loads(report.read_text())
    assert found["violations"] == [0, 0] and "gamma shapes 0.5 and 4" in found["theorem"]
    assert found["provenance"]["command"].startswith(f"tokenweave densification order {a} {b} --densities=1e2,1e4/km2 ")
    assert found["b"]["fading"] == "gamma:4" and found["coverage"]["value"][1][0] > 0
    assert "a is better in every realisation" in capsys.readouterr().out and plot.read_bytes().startswith(PNG)
    run_on_cpu("order", str(b), str(a), *given)
    assert "neither is better in every realisation" in capsys.readouterr().out
    assert sum(json.loads(report.read_text())["violations"]) > BATCH


# --------------------------------------------------------------------------------------------- phase diagram, figures


def test_fitted_exponents_meet_theory_over_the_phase_diagram(tmp_path, capsys):
    report, plot = tmp_path / "phase.json", tmp_path / "phase.png"
    run_on_cpu(
        "phase", "--near-exponents=0,1,1.5,3", "--tail-indices=0.5,1.25,3,inf", f"--n={BATCH}", f"--json={report}",
        f"--plot={plot}",
    )  # fmt: skip
    cells = json.loads(report.read_text())["cells"]
    slopes = {(cell["near_exponent"], cell["tail_index"]): cell["slope"] for cell in cells}
    assert len(slopes) == 16 and plot.read_bytes().startswith(PNG)
    for place, predicted in {(0.0, 0.5): 0.0, (0.0, 3.0): -2.0, (1.0, "inf"): -1.0, (1.5, 3.0): -1 / 3}.items():
        assert slopes[place]["predicted"] == pytest.approx(predicted)
        assert slopes[place]["value"] == pytest.approx(predicted, abs=0.02)
    assert "15 of 15 cells with a predicted power agree" in capsys.readouterr().out


def test_figures_are_drawn_from_runs_that_are_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(figures, "CASES", dict(list(figures.CASES.items())[3:5]))  # rho of 0.5 and of 1.5
    words = f"--folder={tmp_path}", "--quick", "--figures=F2,F6"
    run_on_cpu("reproduce", *words)
    report = json.loads((tmp_path / "F2.json").read_text())
    slopes = {slope["predicted"] for found in report["slopes"].values() for slope in found}
    assert slopes == {1.0, 0.5} and all((tmp_path / name).read_bytes().startswith(PNG) for name in ("F2.png", "F6.png"))
    assert "regime2" in capsys.readouterr().out
    figures._regimes.cache_clear()

    def sampled_again(*arguments, **options):
        raise AssertionError

    monkeypatch.setattr(samplers, "sample_power_domain", sampled_again)
    run_on_cpu("reproduce", *words)
    assert json.loads((tmp_path / "F2.json").read_text())["slopes"] == report["slopes"]
    figures._regimes.cache_clear()
    assert cli.main(["densification", "reproduce", *words, "--seed=8", "--device=cpu"]) == 1
    assert "remove it or take another --folder" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- verify


def test_laws_hold_and_are_told_with_their_z_scores(tmp_path, capsys):
    report = tmp_path / "verify.json"
    run_on_cpu("verify", "--only=saturation", "--n=5e4", f"--json={report}")
    checks = json.loads(report.read_text())["checks"]
    assert {check["law"] for check in checks} == {"saturation, P(SIR > y)", "saturation, rate", "saturation, E[1/SIR]"}
    assert all(abs(check["z"]) < 4 for check in checks) and len(checks) > 20
    golden = {check["name"]: check["value"] for check in checks if "0.5, y" in check["name"]}
    assert golden["delta 0.5, y 1"] == pytest.approx(0.63662, abs=5e-6)
    printed = capsys.readouterr().out
    assert f"{len(checks)} of {len(checks)} exact values are within 4 standard errors" in printed
    assert "E[1/SIR]" in printed


def test_a_law_that_is_wrong_fails_the_command_by_name(monkeypatch, capsys):
    right = saturation.rate
    monkeypatch.setattr(laws.saturation, "rate", lambda delta: right(delta) * (1.05 if delta == 0.5 else 1.0))
    assert cli.main(["densification", "verify", "--only=saturation, rate", "--n=2e4", "--device=cpu"]) == 1
    captured = capsys.readouterr()
    assert "verify: these do not hold: saturation, rate: delta 0.5" in captured.err
    assert "delta 0.3" not in captured.err and "3 of 4 exact values" in captured.out


def test_a_limit_is_held_to_its_tolerance_and_not_against_noise():
    assert Check("", 1.0, 1.02, 0.0, tolerance=0.03).is_within_tolerance
    assert not Check("", 1.0, 1.04, 0.0, tolerance=0.03).is_within_tolerance
    assert Check("", 1.0, 1.04, 0.01, tolerance=0.03).is_within_tolerance
    assert not Check("", 1.0, 1.04, 0.001, tolerance=0.03).is_within_tolerance
    assert Check("", 0.0, 1.0, 0.0).z == inf and Check("", 2.0, 2.0, 0.0).z == 0.0


def test_bench_gives_both_biases(monkeypatch, tmp_path, capsys):
    report, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    monkeypatch.setattr(benchmark, "PAIRS", 2 * BATCH)
    monkeypatch.setattr(bench, "TARGETS", (0.05,))
    run_on_cpu("bench", "--exponent=3", "--target-se=2e-2", f"--json={report}", f"--plot={plot}")
    window, power = sorted(json.loads(report.read_text())["rows"], key=lambda row: -row["bias"])
    assert "window" in window["method"] and window["bias"] > 0.01 > abs(power["bias"]) * 50
    assert all(0.015 < row["standard_error"] < 0.025 for row in (window, power)) and "bias" in capsys.readouterr().out
    assert plot.read_bytes().startswith(PNG)


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.636512, 0.00024, "0.63651(24)"),
        (2.6234e-20, 1.3e-22, "2.623(13)e-20"),
        (0.5, 0.0099961, "0.500(10)"),
        (147405.3, 171.0, "147405(171)"),
        (3.8e7, 2.0e5, "3.800(20)e7"),
        (0.0, 0.0001, "0.0(10)e-4"),
        (0.25, 0.0, "0.25"),
        (0.25, float("nan"), "0.25"),
        (float("nan"), 0.1, "-"),
        (inf, 0.1, "inf"),
        (1e-5, 3e-5, "1.0(30)e-5"),
    ],
)
def test_a_number_has_as_many_digits_as_its_error_allows(value, error, text):
    assert reporting.with_error(value, error) == text


def test_many_thresholds_are_shown_by_a_few_with_both_ends():
    assert reporting.shown_columns(np.arange(3)) == [0, 1, 2]
    shown = reporting.shown_columns(np.arange(31))
    assert shown[0] == 0 and shown[-1] == 30 and len(shown) == reporting.MOST_COLUMNS


def test_other_commands_do_not_load_scipy():
    loads = "import sys, tokenweave_models.cli as cli; assert 'scipy' not in sys.modules"
    code = f"{loads}; cli.main(['densification', 'regime'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 2 and "--path-loss" in found.stderr, found.stderr
