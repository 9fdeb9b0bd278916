"""`tokenweave calibrate`: the fits find known constants, a run on a CPU says what it measured, and a profile of another
device is refused."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenweave_models.common.errors import UserError
from tokenweave_models.tokenweave.calibration import calibrate, measure, profiles
from tokenweave_models.tokenweave.calibration.measure import Measurement
from tokenweave_models.tokenweave.simulator.model_shapes import MODEL_SHAPES

from tokenweave_ops import H100, EmulatedLink, HardwareProfile, _library, gemm_us

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(_library.load_library("cpu") != "loaded", reason="needs the CPU kernels")


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    calibrate.add_arguments(parser)
    return parser.parse_args(words)


# ------------------------------------------------------------------------------------------------------------- the fits


@pytest.fixture
def on_paper(monkeypatch):
    """Times are read from a function of what a call returns, and nothing is computed: tensors have no memory."""

    def use(us_of):
        monkeypatch.setattr(measure, "call_us", lambda call, device, seconds: us_of(call()))
        return torch.device("meta")

    return use


LLAMA = MODEL_SHAPES["llama-3.3-70b"]
GPU_SIZES = measure.effort_for(torch.device("cuda"), LLAMA, 8, quick=True)


def test_the_gemms_of_a_rank():
    """Llama-3.3-70B over 8 ranks: 8 query heads, one key and one value head, 3584 inner features."""
    assert GPU_SIZES.gemms == ((1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584))


def test_the_constants_of_gemms_are_found(on_paper):
    true = replace(H100, gemm_tflops=500.0, gemm_operand_rows=30.0, gemm_wave_us=4.0)
    effort = replace(GPU_SIZES, gemms=GPU_SIZES.gemms[:3])  # whose features differ
    inner_of = dict(effort.gemms)
    device = on_paper(lambda y: float(gemm_us(y.shape[0], y.shape[1], inner_of[y.shape[1]], true)))
    guess = replace(H100, gemm_samples=((1280, 8192, 64, 1e6),))
    found = measure.measure_gemm(guess, device, torch.bfloat16, effort)
    assert found.error < 0.005 and found.num_times == len(effort.gemm_rows) * 3
    profile = H100.with_measured(**found.fields)
    for features, inner in GPU_SIZES.gemms:  # those timed and one other: constants can make up for each other
        us = gemm_us(np.array(effort.gemm_rows), features, inner, profile)
        assert us == pytest.approx(gemm_us(np.array(effort.gemm_rows), features, inner, true), rel=0.03)
    assert found.values["gemm_tflops"] == pytest.approx(500, rel=0.15)
    assert profile.sources["gemm_samples"] == "measured"


def test_the_constants_of_attention_are_found(on_paper):
    tflops, extra_keys = 400.0, 300.0

    def us(y: torch.Tensor) -> float:
        _, heads, queries, head_dim = y.shape
        flops = 4 * head_dim * heads * (queries * (queries + 1) / 2 + extra_keys * queries)
        return flops / (tflops * 1e6) + H100.kernel_us

    found = measure.measure_attention(H100, on_paper(us), torch.bfloat16, GPU_SIZES)
    assert found.values["attention_tflops"] == pytest.approx(tflops, rel=0.01)
    assert found.values["attention_extra_keys"] == pytest.approx(extra_keys, rel=0.05)


def test_the_constants_of_a_link_are_found():
    """Those of the built-in link, from other first guesses, over CTAs; and a link without CTAs."""
    times = [
        (num_bytes, ctas, float(H100.link.collective_us(num_bytes, 8, ctas)))
        for num_bytes in (1 << 20, 1 << 23, 1 << 26, 1 << 28)
        for ctas in (2, 4, 8, 16, 32)
    ]
    guess = replace(H100, link=replace(H100.link, link_gb_s=100.0, latency_us=5.0, cta_gb_s=20.0, stream_gb_s=300.0))
    found = measure.fit_link(guess, 8, times)
    assert found.error < 0.01
    for name in profiles.LINK_FIELDS:
        assert found.values[name] == pytest.approx(getattr(H100.link, name), rel=0.05), name
    times = [(num_bytes, 1, 40.0 + num_bytes * 1.5 / 2e3) for num_bytes in (1024, 1 << 18, 1 << 20)]
    found = measure.fit_link(profiles.CPU, 2, times)
    assert found.values == {"link_gb_s": pytest.approx(2.0, rel=0.01), "latency_us": pytest.approx(40.0, rel=0.01)}


def test_a_fit_stays_near_its_guess():
    """Times that have nothing to do with the formula give a poor fit, not absurd constants."""
    found = measure.fit(["rate"], [1.0], lambda rate: [1e9 / rate], [1e-9])
    assert found.values["rate"] <= measure.MAX_FACTOR and found.error > 1


# ------------------------------------------------------------------------------------------------ a run on this machine


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A quick run with two ranks and an emulated link: (profile file, what was printed, the profile, this device)."""
    if _library.load_library("cpu") != "loaded":
        pytest.skip("needs the CPU kernels")
    path = tmp_path_factory.mktemp("calibrate") / "new folder" / "profile.json"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr(calibrate, "print_table", lambda title, columns, rows: printed.append((title, list(rows))))
        calibrate.run(
            parse("--device", "cpu", "--quick", "--link-gb-s", "0.1", "--link-us", "3000", "--output", str(path))
        )
    return path, printed, HardwareProfile.load(path)


MEASURED = {"num_sms", "gemm_tflops", "attention_tflops", "attention_extra_keys", "hbm_gb_s", "norm_gb_s", "kernel_us"}
MEASURED |= {"gemm_samples", "eager_launch_us", "link_gb_s", "latency_us"}


def test_it_says_what_it_measured(calibrated):
    _, printed, profile = calibrated
    (title, rows), (_, fits) = printed
    assert profile.device in title
    state = {name: (state, why) for name, _, _, state, why in rows}
    assert {name for name, (how, _) in state.items() if how == "measured"} == MEASURED
    assert state["graph_launch_us"] == ("kept", "a CPU has no CUDA graphs")
    assert all(why for how, why in state.values() if how == "kept")
    assert state["link_gb_s"][1] == "emulated link of 0.1 GB/s, 3000 us"
    assert [name for name, *_ in fits] == [*measure.STEPS, calibrate.LINK]


def test_what_it_measured_is_of_this_machine(calibrated):
    """Lower bounds only where another process may disturb: a rank cannot beat its link."""
    path, _, profile = calibrated
    assert profile.name == "2 ranks, bf16"
    assert profile.num_sms == max(1, calibrate.usable_cores() // 2)
    for name in MEASURED - {"num_sms", "link_gb_s", "latency_us", "attention_extra_keys"}:
        assert getattr(profile, name) != getattr(profiles.CPU, name), name
    effort = measure.effort_for(CPU, calibrate.SMALL, 2, quick=True)
    num_bytes = effort.rows[-1] * effort.hidden * 2
    shapes = {(features, inner) for features, inner, _, _ in profile.gemm_samples}
    assert shapes == set(effort.gemms) and len(profile.gemm_samples) == len(shapes) * len(effort.gemm_rows)
    promised_us = EmulatedLink(0.1, 3000).occupied_us(num_bytes, 2)
    assert profile.link.collective_us(num_bytes, 2, 1) > 0.8 * promised_us
    assert profile.link.sms_per_cta == 0, "an emulated link sleeps"
    assert json.loads(path.read_text())["sources"]["norm_gb_s"] == "measured"


def test_it_is_used_on_this_device_and_refused_on_others(calibrated, monkeypatch):
    path, _, profile = calibrated
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(profile.num_sms)  # as its ranks have
        assert profiles.profile_of(CPU, path) == profile
        link = profiles.profile_of(CPU, path, EmulatedLink(2.0, 7.0)).link
        assert (link.link_gb_s, link.latency_us, link.sms_per_cta) == (2.0, 7.0, 0)
        torch.set_num_threads(profile.num_sms + 1)
        with pytest.raises(UserError, match="was made on .* this device is .*calibrate"):
            profiles.profile_of(CPU, path)
    finally:
        torch.set_num_threads(threads)


def test_one_rank_has_no_link(monkeypatch):
    found = {name: Measurement({}) for name in measure.STEPS} | {"GEMM": Measurement({"gemm_tflops": 0.25}, 0.1, 16)}
    rank = (profiles.built_in_profile(CPU).to_json(), found, [])
    monkeypatch.setattr(calibrate, "run_ranks", lambda work, ranks, *arguments, **options: [rank])
    task = calibrate.Task(calibrate.SMALL, 1, torch.float32, quick=True)
    profile, found, why = calibrate.calibrate(CPU, 1, task, lambda name: None)
    assert why == "one rank (--ranks 1)" and calibrate.LINK not in found
    assert profile.gemm_tflops == 0.25 and profile.name == "fp32"
    assert profile.link.link_gb_s == profiles.CPU.link.link_gb_s
    assert profile.sources["link_gb_s"].endswith("not measured: one rank (--ranks 1)")


# --------------------------------------------------------------------------------------------------------- what is said


def test_ranks_are_put_together_by_the_median():
    of_ranks = [
        Measurement({"rate": rate}, error, 3, ((8, 8, 16, 2.0 * rate),))
        for rate, error in ((1, 0.1), (5, 0.3), (2, 0.2))
    ]
    assert calibrate._together(of_ranks) == Measurement({"rate": 2}, 0.3, 3, ((8, 8, 16, 4.0),))


def test_a_built_in_profile_is_no_measurement():
    profile = profiles.built_in_profile(CPU)
    assert profile.device == profiles.device_name(CPU) and profile.num_sms == torch.get_num_threads()
    assert profile.sources["gemm_tflops"] == "assumption: that of the built-in profile cpu"
    assert profile.link.sms_per_cta == 1, "summing through shared memory takes a core"


def test_sources_are_of_fields_only():
    profile = replace(H100, gemm_samples=((8, 8, 16, 1.0),))
    assert profile.gemm_curves  # which the profile then keeps
    assert profiles.sources_of(profile).keys() == profiles.sources_of(H100).keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ranks", "100000"), "--ranks: must be at most .* the cores that this process may use, got 100000"),
        (("--link-us", "5"), "--link-us needs --link-gb-s"),
        (("--link-gb-s", "-1"), "EmulatedLink: gigabytes_per_s must be positive and finite, got -1.0"),
        (("--link-gb-s", "1", "--ranks", "1"), "only CPU ranks, two or more, can have an emulated link"),
        (("--tp", "3"), "--tp: ModelShape: world_size 3 must divide num_heads=16"),
        (("--output", "/dev/null/profile.json"), "--output /dev/null/profile.json: cannot make its folder"),
    ],
)
@needs_kernels
def test_bad_arguments(words, message):
    with pytest.raises(UserError, match=message):
        calibrate.run(parse("--device", "cpu", *words))


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot be read: No such file"), ("{}", "is not a tokenweave hardware profile")]
)
def test_files_that_are_no_profile(tmp_path: Path, text, message):
    path = tmp_path / "profile.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        profiles.load_profile(path, CPU)
