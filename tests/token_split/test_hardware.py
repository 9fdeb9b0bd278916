"""Hardware profiles: files, checks, and that one made elsewhere is refused."""

import json
import math
from dataclasses import replace

import pytest

from tokenweave_ops._hardware import MEASURABLE
from tokenweave_ops.token_split import H100, HardwareProfile, LinkModel, cpu_profile

CPU = cpu_profile("some cpu", 2, gemm_tflops=0.1, memory_gb_s=10.0, link_gb_s=1.0, link_latency_us=50.0)


@pytest.mark.parametrize("profile", [H100, CPU, replace(H100, gemm_samples=((7168, 8192, 512, 99.5),))])
def test_files(profile, tmp_path):
    path = tmp_path / "profile.json"
    profile.save(path)
    assert HardwareProfile.load(path) == profile
    # Other programs read it too: no infinities, which JSON does not have.
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_every_built_in_number_says_where_it_comes_from():
    for profile in (H100, CPU):
        without = set(MEASURABLE) - profile.sources.keys()
        assert without <= {"gemm_samples"}, without
        kinds = {source.split(":")[0] for source in profile.sources.values()}
        assert kinds <= {"datasheet", "fit", "public", "assumption"}


def test_measured_fields_are_marked():
    profile = CPU.with_measured(gemm_tflops=0.2, link_gb_s=3.0, norm_gb_s=7.0)
    assert (profile.gemm_tflops, profile.link.link_gb_s, profile.norm_gb_s) == (0.2, 3.0, 7.0)
    measured = {name for name, source in profile.sources.items() if source == "measured"}
    assert measured == {"gemm_tflops", "link_gb_s", "norm_gb_s"}
    assert CPU.gemm_tflops == 0.1 and CPU.sources["gemm_tflops"] != "measured"
    with pytest.raises(ValueError, match=r"HardwareProfile: cannot measure \['cta_choices', 'speed'\]"):
        CPU.with_measured(speed=1.0, cta_choices=(1,))


def test_another_device_is_refused_by_name():
    H100.check_device("NVIDIA H100 80GB HBM3")
    with pytest.raises(
        ValueError, match="profile 'h100' was made on 'NVIDIA H100 80GB HBM3', this device is 'NVIDIA A100'"
    ):
        H100.check_device("NVIDIA A100")


def edited(change) -> str:
    data = json.loads(H100.to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a tokenweave hardware profile"),
        ('{"format": "something else"}', "is not a tokenweave hardware profile"),
        (edited(lambda d: d.update(version=2)), "version must be 1, got 2"),
        (edited(lambda d: d.pop("gemm_tflops")), r"missing keys \['gemm_tflops'\], unknown keys \[\]"),
        (edited(lambda d: d.update(speed=1)), r"missing keys \[\], unknown keys \['speed'\]"),
        (edited(lambda d: d["link"].pop("latency_us")), r"link: missing keys \['latency_us'\]"),
        (edited(lambda d: d.update(link=3)), "link: must be an object, got int"),
        (edited(lambda d: d.update(gemm_tflops="fast")), "gemm_tflops must be float, got 'fast'"),
        (edited(lambda d: d.update(gemm_tflops=0)), "gemm_tflops must be positive and finite, got 0"),
        (edited(lambda d: d.update(kernel_us=-1)), "kernel_us must be at least 0 and finite, got -1"),
        (edited(lambda d: d.update(num_sms=1.5)), "num_sms must be int, got 1.5"),
        (edited(lambda d: d.update(device="")), "device must be a name, got ''"),
        (edited(lambda d: d.update(gemm_tiles=[])), "gemm_tiles must be pairs of positive sizes"),
        (edited(lambda d: d.update(gemm_samples=[[1, 2, 3]])), "gemm_samples must be .features, inner, rows"),
        (edited(lambda d: d.update(sources={"speed": "measured"})), r"sources names unknown fields \['speed'\]"),
        (edited(lambda d: d["link"].update(cta_choices=[0])), "cta_choices must be positive integers"),
    ],
)
def test_bad_files(text, words):
    with pytest.raises(ValueError, match=f"^here: .*{words}"):
        HardwareProfile.from_json(text, "here")


def test_exposed_collectives_of_large_batches_have_more_ctas():
    assert [H100.link.exposed(num_tokens) for num_tokens in (1, 8191, 8192, 8193)] == [16, 16, 32, 32]


def test_bad_numbers():
    with pytest.raises(ValueError, match="LinkModel: link_gb_s must be positive, got nan"):
        LinkModel(link_gb_s=math.nan, latency_us=1.0)
    with pytest.raises(ValueError, match="LinkModel: latency_us must be at least 0 and finite, got inf"):
        LinkModel(link_gb_s=1.0, latency_us=math.inf)
    with pytest.raises(ValueError, match="HardwareProfile: hbm_gb_s must be positive and finite, got inf"):
        replace(H100, hbm_gb_s=math.inf)
    with pytest.raises(ValueError, match="HardwareProfile: num_sms must be int, got True"):
        replace(H100, num_sms=True)
