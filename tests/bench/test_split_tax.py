"""The bench of token splitting: which splits, ratios, verdicts, schema and tables, on invented times; then for real."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gemm_beside, run, split_gemms, split_report, split_tax, terminal
from bench.split_gemms import MlpSizes, mlp_call, planned_split, predicted_us, published_splits, searched_splits
from tokenweave_ops.token_split import H100, cpu_profile, gemm_us

ROOT = Path(__file__).resolve().parents[2]
SMALL = MlpSizes(hidden=16, intermediate=8, dtype=torch.float32)
LIKE_PUBLISHED = {"hidden": 8192, "intermediate": 3584, "dtype": "bf16"}


# --- which splits -----------------------------------------------------------------------------------------------------


def test_searched_splits_are_the_multiples_of_64_with_37_percent_in_either_half():
    assert searched_splits(1024) == [384, 448, 512, 576, 640]
    assert searched_splits(100) == [] and searched_splits(64) == []
    assert searched_splits(6400)[0] == 2368 and searched_splits(6400)[-1] == 4032  # 37 % exactly: inclusive
    assert searched_splits(6401)[0] == 2432
    assert searched_splits(96, 16) == [48]


def test_published_splits_are_those_of_the_published_rule():
    assert published_splits(1280) == {0: 640, 64: 704, 128: 768, 192: 832, 256: 896}
    assert published_splits(1000) == {} and published_splits(1300) == {}  # not split, padded


def profile(**changes):
    base = cpu_profile("test", 4, gemm_tflops=1.0, memory_gb_s=1e9, link_gb_s=1.0, link_latency_us=1.0)
    return replace(base, **changes)


def test_the_planned_split_is_the_fastest_of_the_model_and_the_most_even_of_equals():
    # Tiles of 256 rows: whole tiles in both halves waste nothing, every other split computes a tile more.
    tiles = profile(gemm_tiles=((256, 64),), split_step=64, num_sms=1)
    assert planned_split(1280, SMALL, tiles) in (512, 768)  # 640 has three tiles in both halves
    assert planned_split(1024, SMALL, tiles) == 512
    free = profile(gemm_tiles=((1, 64),), split_step=64, num_sms=1)  # no split costs anything
    assert planned_split(1280, SMALL, free) == 640
    assert planned_split(16, SMALL, tiles) is None


def test_predictions_are_the_sum_over_the_gemms_of_both_halves():
    whole, split = predicted_us(1280, [1280, 512], split_gemms.PUBLISHED_SIZES, H100)
    assert whole == pytest.approx(gemm_us(1280, 7168, 8192, H100) + gemm_us(1280, 8192, 3584, H100))
    assert split == pytest.approx(
        sum(gemm_us(rows, *gemm, H100) for rows in (512, 768) for gemm in ((7168, 8192), (8192, 3584)))
    )


# --- measuring, on a clock that tests move ----------------------------------------------------------------------------


def timed_calls(clock, costs_us, call=mlp_call, ran=None):
    """Calls that compute for real and take invented times: by split, the unsplit one's at 0."""

    def make(buffers, splits):
        compute = call(buffers, splits)

        def timed():
            compute()
            split = splits[0] if splits else 0
            if ran is not None:
                ran.append(split)
            clock.advance(costs_us.get(split, 200) * 1e-6)

        return timed

    return make


def measured(machine, clock, costs_us, num_tokens=1280, **options):
    plan = profile(gemm_tiles=((256, 64),), split_step=64, num_sms=1)  # plans 512
    return split_gemms.measure_tax(
        num_tokens, SMALL, plan, machine, 0.0, make=timed_calls(clock, costs_us, **options)
    )  # fmt: skip


def test_ratios_best_and_distance_from_the_best(machine, clock):
    row = measured(machine, clock, {0: 100, 512: 104, 576: 110, 640: 120, 704: 102, 768: 106})
    assert row["ok"] and row["us"] == pytest.approx(100) and row["cache"] == "cold" and row["rounds"] >= 7
    assert row["searched"] == [512, 576, 640, 704, 768] and row["published"] == [640, 704, 768, 832, 896]
    assert row["ratios"] == pytest.approx(
        {"512": 1.04, "576": 1.1, "640": 1.2, "704": 1.02, "768": 1.06, "832": 2.0, "896": 2.0}
    )
    assert (row["equal"], row["planned"], row["best"]) == (640, 512, 704)
    assert row["planned_over_best"] == pytest.approx(1.04 / 1.02)
    # Pairs (512, 768) and (576, 704).
    assert row["mirror_noise"] == pytest.approx(((1 - 1.04 / 1.06) + (1.1 / 1.02 - 1)) / 2)
    split_report.validate(document(tax=[row]))


def test_a_split_outside_the_searched_range_is_never_the_best(machine, clock):
    row = measured(machine, clock, {0: 100, 896: 50, 512: 104})
    assert row["ratios"]["896"] == pytest.approx(0.5) and row["best"] == 512


def _no_second_half(buffers, splits):
    return mlp_call({name: b[: splits[0]] if splits and name in ROWS else b for name, b in buffers.items()}, [])


def _off_by_one(buffers, splits):
    if not splits:
        return mlp_call(buffers, [])
    shifted = buffers | {"x": torch.cat([buffers["x"][: splits[0] - 1], buffers["x"][splits[0] - 2 : -1]])}
    return mlp_call(shifted, splits)


def _no_activation(buffers, splits):
    def call():
        gate, up = (buffers["x"] @ buffers["gate_up_weight"].t()).chunk(2, dim=-1)
        torch.mm(gate * up, buffers["down_weight"].t(), out=buffers["y"])

    return call


ROWS = ("x", "gate_up", "activation", "y")
SPLITS = [512, 576, 640, 704, 768, 832, 896]


@pytest.mark.parametrize(
    "call, wrong", [(_no_second_half, SPLITS), (_off_by_one, SPLITS), (_no_activation, [0, *SPLITS])]
)
def test_a_wrong_result_is_never_timed(machine, clock, call, wrong):
    ran = []
    row = measured(machine, clock, {}, call=call, ran=ran)
    assert row["wrong"] == wrong and not row["ok"]
    assert ran == [0, *SPLITS]  # the check alone
    assert row["us"] is None and row["ratios"] == {} and row["best"] is None and row["mirror_noise"] is None
    split_report.validate(document(tax=[row]))
    cells = split_report.tax_cells(row, published=True)
    assert cells == ["1280", "wrong", *["-"] * (len(split_report.TAX_HEADINGS) - 2)]
    assert split_report.verdicts([row]) == []


def test_bf16_results_are_within_the_tolerance_and_one_wrong_element_at_the_cut_is_not(machine, clock):
    sizes, plan, ran = MlpSizes(64, 32, torch.bfloat16), profile(split_step=64), []

    def spoiled(buffers, splits):
        compute = mlp_call(buffers, splits)

        def call():
            compute()
            if splits == [256]:
                buffers["y"][256, 5] += 0.125

        return call

    row = split_gemms.measure_tax(512, sizes, plan, machine, 0.0, make=timed_calls(clock, {}, spoiled, ran))
    assert row["wrong"] == [256] and ran == [0, 192, 256, 320]
    row = split_gemms.measure_tax(512, sizes, plan, machine, 0.0, make=timed_calls(clock, {}))
    assert row["ok"] and 0 < row["max_err"] < sizes.tolerance


# --- verdicts and tables ----------------------------------------------------------------------------------------------


def tax_row(planned=512, **changes) -> dict:
    row = {
        "num_tokens": 1280, "ok": True, "cache": "cold", "max_err": 1e-3, "wrong": [], "equal": 640, "planned": planned,
        "searched": [512, 576, 640, 704, 768], "published": [640, 704, 768, 832, 896], "predicted_ratio": 1.06,
        "us": 372.0, "us_p20": 370.0, "us_p80": 376.0, "best": 704, "planned_over_best": 1.0196, "mirror_noise": 0.002,
        "ratios": {"512": 1.04, "576": 1.1, "640": 1.2, "704": 1.02, "768": 1.06, "832": 1.3, "896": 1.4},
        "rounds": 20, "flags": [],
    }  # fmt: skip
    return row | changes


def beside_row(**changes) -> dict:
    entry = {"max_ctas": 4, "ratio": 1.08, "gb_per_s": 310.5, "hidden": 0.93}
    return {
        "gemm": "qkv", "num_tokens": 1024, "features": 1280, "inner": 8192, "ok": True, "cache": "cold",
        "max_err": 1e-3, "us": 50.0, "us_p20": 49.0, "us_p80": 51.0, "beside": [entry], "flags": [],
    } | changes  # fmt: skip


def document(tax=(), beside=(), sizes=LIKE_PUBLISHED, **env) -> dict:
    described = {
        "git": {"commit": "0123456789ab", "dirty": False}, "device": "cuda", "cpu": "Some CPU", "cores": 2,
        "threads": 2, "caches": {}, "torch": "2.14.1", "date": "2026-01-02T03:04:05Z", "gpu": "Some GPU", "sms": 132,
    }  # fmt: skip
    alone = {"max_ctas": 4, "ok": True, "max_err": 0.01, "us": 300.0, "gb_per_s": 335.5}
    collective = {
        "world_size": 2, "num_tokens": 1024, "hidden": 8192, "call_bytes": 100663296, "sets": 3, "alone": [alone]
    }  # fmt: skip
    return {
        "schema": split_report.SCHEMA, "version": split_report.VERSION, "env": described | env, "sizes": sizes,
        "profile": "h100 (Some GPU)", "tax": list(tax), "collective": collective, "beside": list(beside), "skipped": {},
        "note": gemm_beside.SEE_NOT,
    }  # fmt: skip


@pytest.mark.parametrize("over_best, fits", [(1.0, True), (1.01, True), (1.0101, False), (0.99, True), (None, None)])
def test_within_one_percent_of_the_best(over_best, fits):
    assert split_report.is_within(tax_row(planned_over_best=over_best)) is fits


def equal_costs(ratio, **changes) -> dict:
    row = tax_row(**changes)
    return row | {"ratios": row["ratios"] | {"640": ratio}}


@pytest.mark.parametrize(
    "row, verdict",
    [
        (equal_costs(1.05), "below"),  # the planner's 1.04 is
        (equal_costs(1.04), "not below"),  # equal is not below
        (equal_costs(1.035), "not below"),
        (equal_costs(1.05, planned=576), "not below"),  # 1.1
        (equal_costs(1.2, planned=640), "not below"),  # the planner says equal halves, 704 is better
        (equal_costs(1.031, planned=640, best=640), "equal is best"),
        (equal_costs(1.03), None),  # does not cost more than 3 %
        (equal_costs(1.05, planned=None), None),
    ],
)
def test_against_equal_halves(row, verdict):
    assert split_report.against_equal(row) == verdict


def test_verdicts_name_the_sizes_that_fail():
    good = equal_costs(1.05, num_tokens=1024, planned_over_best=1.004)
    bad = equal_costs(1.05, num_tokens=2048, planned=576, planned_over_best=1.078, mirror_noise=0.013)
    best = equal_costs(1.05, num_tokens=3072, planned=640, best=640, planned_over_best=1.0)
    text = " ".join(split_report.verdicts([good, bad, best]))
    assert "within 1 % of the best split at 2 of 3 sizes; farthest at 2048 tokens, +7.8 %." in text
    assert "more than 3 % at 3 sizes; the planner is below them at 1." in text
    assert "At 3072 tokens no split is below them." in text and "At 2048 tokens the planner is not" in text
    assert "differ by 1.3 %" in text
    text = " ".join(split_report.verdicts([good]))
    assert "at 1 of 1 sizes" in text and "is not" not in text and "no split" not in text


def test_cells_of_a_size_with_the_published_figure_beside_it():
    cells = dict(zip(split_report.TAX_HEADINGS, split_report.tax_cells(tax_row(), published=True), strict=True))
    assert (cells["us"], cells["equal"], cells["planner S"], cells["planner"]) == ("372.0", "1.200", "512", "1.040")
    assert (cells["best S"], cells["best"], cells["of best"], cells["offsets"]) == ("704", "1.020", "+2.0 %", "1.020")
    assert (cells["paper equal"], cells["paper best"]) == ("1.228", "1.078")
    assert split_report.tax_cells(tax_row(), published=False)[-2:] == ["-", "-"]


def test_the_published_figure_stands_only_beside_its_own_sizes_and_is_labelled():
    assert "published by TokenWeave's authors, another machine" in " ".join(split_report.remarks(document([tax_row()])))
    other = document([tax_row()], sizes={"hidden": 256, "intermediate": 112, "dtype": "bf16"})
    assert not split_report.has_published_sizes(other) and "paper" not in " ".join(split_report.remarks(other))
    assert set(split_report.PUBLISHED) == set(split_gemms.PUBLISHED_TOKENS)


def test_cells_beside_a_collective_state_blocks_of_all_ranks_and_what_they_would_take():
    (cells,) = split_report.beside_cells(beside_row(), document(beside=[beside_row()]))
    expected = ["qkv", "1024", "cold", "50.0", "4", "8", "1.080", f"{132 / 124:.3f}", "310.5", "335.5", "93 %"]
    assert cells == expected
    unknown = beside_row(beside=[{"max_ctas": 4, "ratio": 1.5, "gb_per_s": None, "hidden": None}])
    (cells,) = split_report.beside_cells(unknown, document())
    assert cells[6] == "1.500" and cells[8] == cells[10] == "-"
    wrong = beside_row(ok=False, us=None, us_p20=None, us_p80=None, beside=[])
    (cells,) = split_report.beside_cells(wrong, document())
    assert cells == ["qkv", "1024", "cold", "wrong", *["-"] * 7]


@pytest.mark.parametrize("with_rich", [True, False])
def test_tables_fit_120_columns(with_rich, monkeypatch, capsys):
    if not with_rich:
        monkeypatch.setattr(terminal, "Console", None)
    doc = document([tax_row(us=12345.6, us_p20=12000.1, us_p80=13000.2)], [beside_row()], other_load=0.5)
    doc["skipped"], doc["collective"]["alone"][0]["ok"] = {"a part": "a reason"}, False
    split_report.print_tables(doc, terminal.Terminal())
    printed = capsys.readouterr().out
    for words in ("12000.1 - 13000.2", "does not show a link", "a part was skipped: a reason", "50 % of its cores"):
        assert words in " ".join(printed.split())
    assert "max_ctas=4 is wrong" in printed and "\u2026" not in printed
    assert max(map(len, printed.splitlines())) <= 120


# --- the schema -------------------------------------------------------------------------------------------------------


def test_a_whole_document_is_valid_and_survives_json():
    split_report.validate(json.loads(json.dumps(document([tax_row()], [beside_row()]))))


def damaged(doc: dict, path: list, value) -> dict:
    place = doc
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return doc


@pytest.mark.parametrize(
    "path, value, message",
    [
        (["schema"], "other", "document: must be 'tokenweave split tax' version 1"),
        (["version"], 2, "document: must be"),
        (["extra"], 1, r"document: fields differ: \['extra'\]"),
        (["env"], {"device": "cpu"}, "env: missing git"),
        (["tax", 0, "us"], math.nan, r"tax\[0\].us: is nan"),
        (["tax", 0, "us"], 1.0, r"tax\[0\]: bad times"),
        (["tax", 0, "ok"], 1, r"tax\[0\].ok: is 1, expected bool"),
        (["tax", 0, "ok"], False, r"tax\[0\]: the result is wrong, yet it states a time"),
        (["tax", 0, "cache"], "warm", r"tax\[0\].cache: is 'warm'"),
        (["tax", 0, "best"], 896, r"tax\[0\].best: is 896, not searched"),
        (["tax", 0, "ratios"], {"512": 1.0}, r"tax\[0\].ratios: splits differ"),
        (["tax", 0, "ratios", "512"], -1.0, r"tax\[0\].ratios: must be positive"),
        (["tax", 0, "more"], 1, r"tax\[0\]: fields differ: \['more'\]"),
        (["beside", 0, "ok"], False, r"beside\[0\]: the result is wrong"),
        (["beside", 0, "max_err"], None, r"beside\[0\]: a correct row states its error"),
        (["beside", 0, "beside", 0, "ratio"], None, r"beside\[0\].beside.ratio: is None"),
        (["collective"], None, "document: beside needs the collective"),
        (["collective", "alone", 0, "us"], "fast", "collective.alone.us: is 'fast'"),
    ],
)
def test_a_damaged_document_is_refused_by_name(path, value, message):
    with pytest.raises(ValueError, match=message):
        split_report.validate(damaged(document([tax_row()], [beside_row()]), path, value))


# --- as a user starts it ----------------------------------------------------------------------------------------------


def start(script, *arguments):
    command = [sys.executable, str(ROOT / "bench" / script), *map(str, arguments)]
    # One thread: on a busy machine two that wait for each other would make this test slow.
    environment = os.environ | {"TOKENWEAVE_BENCH_CACHE_BYTES": str(1 << 20), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_a_run_writes_a_valid_file_tables_and_a_picture(tmp_path):
    result, picture = tmp_path / "out" / "split_tax.json", tmp_path / "picture.png"
    sizes = ("--tokens", "1024", "--hidden", 64, "--intermediate", 32)
    done = start("split_tax.py", "--device", "cpu", "--quick", *sizes, "--json", result)
    assert done.returncode == 0, done.stdout + done.stderr
    doc = split_report.load(result)
    assert [row["num_tokens"] for row in doc["tax"]] == [1024] and doc["skipped"] == {}
    assert [row["gemm"] for row in doc["beside"]] == ["qkv", "o_proj", "gate_up", "down"]
    assert doc["collective"]["alone"][0]["gb_per_s"] > 0 and 0 <= doc["env"]["other_load"] <= 1
    assert "split tax on cpu" in done.stdout and "GEMMs beside a collective on cpu" in done.stdout
    drawn = start("split_report.py", result, "-o", picture)
    assert drawn.returncode == 0, drawn.stderr
    assert "split tax on cpu" in drawn.stdout and picture.stat().st_size > 10_000


def test_a_picture_of_the_published_sizes_and_of_nothing(tmp_path):
    split_report.draw(document([tax_row()], [beside_row()]), tmp_path / "both.png")
    split_report.draw(document([tax_row()]), tmp_path / "one.png")
    assert (tmp_path / "both.png").stat().st_size > (tmp_path / "one.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="no correct row"):
        split_report.draw(document(), tmp_path / "none.png")


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("TOKENWEAVE_BENCH_CACHE_BYTES", str(1 << 20))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


TINY = ["--device", "cpu", "--quick", "--tokens", "1024", "--hidden", "64", "--intermediate", "32"]


def test_wrong_results_end_the_run_with_1_and_print_no_speed(one_thread, monkeypatch, capsys):
    right = split_gemms.mlp_reference
    monkeypatch.setattr(split_gemms, "mlp_reference", lambda *inputs: right(*inputs) + 1)
    assert split_tax.main([*TINY, "--part", "tax", "--dtype", "fp32"]) == 1
    printed = capsys.readouterr().out
    (line,) = [line.split() for line in printed.split("split tax on cpu")[1].splitlines() if "wrong" in line]
    assert line[:2] == ["1024", "wrong"] and set(line[2:]) == {"-"} and "Planner within" not in printed


def test_a_part_that_cannot_run_is_named_and_leaves_the_other_part(one_thread, monkeypatch, capsys, tmp_path):
    def cannot(*_arguments):
        raise RuntimeError("no kernels were built for this device\nsecond line")

    monkeypatch.setattr(gemm_beside, "Collective", cannot)
    assert split_tax.main([*TINY, "--json", str(tmp_path / "a.json")]) == 1
    doc = split_report.load(tmp_path / "a.json")
    assert doc["tax"][0]["ok"] and doc["beside"] == [] and "no kernels were built" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tokens", "100"], "100 tokens have no split at a multiple of 64"),
        (["--tokens", "1k"], "must be numbers, as in 1024,2048, got '1k'"),
        (["--hidden", "12"], "hidden must be a multiple of 8"),
        (["--profile", "absent.json"], "--profile: "),
    ],
)
def test_bad_arguments_are_sentences(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        split_tax.main(["--device", "cpu", *arguments])
    assert message in f"{ended.value} {capsys.readouterr().err}"


def test_a_profile_of_another_device_is_refused(tmp_path):
    H100.save(tmp_path / "h100.json")
    with pytest.raises(SystemExit, match="was made on 'NVIDIA H100 80GB HBM3', this device is"):
        split_tax.main(["--device", "cpu", "--profile", str(tmp_path / "h100.json")])


def test_it_is_no_family_of_the_other_bench():
    assert not {"split_tax", "split_gemms", "split_report", "gemm_beside"} & set(run.find_families(ROOT / "bench"))
