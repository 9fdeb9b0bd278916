"""The grammar of the command line's quantities: what is accepted, and that each refusal names field and form."""

import numpy as np
import pytest
from tokenweave_models.common.errors import UserError
from tokenweave_models.densification import units
from tokenweave_models.densification.fading import FadingTable, Gamma, LogPareto, Pareto, Product, Rice, Suzuki, Weibull
from tokenweave_models.densification.path_loss import MultiSlope, PathLossTable, StretchedExponential


def test_densities():
    grid = units.parse_densities("1e-1:1e6:29/km2")
    assert grid.shape == (29,) and grid[0] == pytest.approx(0.1) and grid[-1] == pytest.approx(1e6)
    np.testing.assert_allclose(np.diff(np.log10(grid)), 0.25)
    np.testing.assert_allclose(units.parse_densities(" 0.5, 2 /m2"), [5e5, 2e6])
    np.testing.assert_allclose(units.parse_densities("30/km2"), [30])


def test_thresholds():
    np.testing.assert_allclose(units.parse_thresholds("-10:20:1dB"), np.arange(-10, 21))
    np.testing.assert_allclose(units.parse_thresholds("0:1:0.3 dB"), [0, 0.3, 0.6, 0.9])
    np.testing.assert_allclose(units.parse_thresholds("0:1:0.1dB")[-1], 1)
    np.testing.assert_allclose(units.parse_thresholds("-3,0dB"), [-3, 0])
    np.testing.assert_allclose(units.parse_thresholds("0.1,1,100x"), [-10, 0, 20])


def test_lengths_and_powers():
    assert units.parse_length_m("10m", "x") == 10 and units.parse_length_m("40 km", "x") == 4e4
    assert units.parse_length_m("5cm", "x") == pytest.approx(0.05)
    assert units.parse_power_dbm("30dBm") == 30 and units.parse_power_dbm("100mW") == pytest.approx(20)
    assert units.parse_noise("0") == 0
    assert units.parse_noise("-92dBm", 30) == pytest.approx(10**-12.2)
    assert units.parse_noise("-122dB") == pytest.approx(10**-12.2)
    assert units.parse_noise("6e-13x") == 6e-13


@pytest.mark.parametrize(
    "text, kind",
    [
        ("slope:4", MultiSlope),
        ("ms:0@10m,4", MultiSlope),
        ("ms:0@10m,4;rinf=40000m", MultiSlope),
        ("ms:0.5@10m,2@300m,4;h=3m;min=1m", MultiSlope),
        ("stretched:0.9,0.5;rinf=1000m", StretchedExponential),
    ],
)
def test_path_losses_say_again_what_they_were_told(text, kind):
    law = units.parse_path_loss(text)
    assert type(law) is kind and law.describe() == text
    assert units.parse_path_loss(text.replace(",", ", ").replace(";", " ; ")).describe() == text


@pytest.mark.parametrize(
    "text, kind",
    [
        ("none", None),
        ("rayleigh", None),
        ("gamma:0.5", Gamma),
        ("nakagami:2", None),
        ("rice:6dB", Rice),
        ("weibull:0.7", Weibull),
        ("pareto:1.5", Pareto),
        ("logpareto:2", LogPareto),
        ("rayleigh*lognormal:8dB", Suzuki),
        ("gamma:2*lognormal:6dB", Product),
    ],
)
def test_fadings_say_again_what_they_were_told(text, kind):
    law = units.parse_fading(text)
    assert law.describe() == text and (kind is None or type(law) is kind)


def test_tables_are_read(tmp_path):
    file = tmp_path / "loss.txt"
    file.write_text("# metres, dB\n1 0\n10, 7\n100 50\n")
    law = units.parse_path_loss(f"table:{file};h=2m")
    assert isinstance(law, PathLossTable) and law.height == 2
    assert law.slant_log_loss(np.log([100.0]))[0] == pytest.approx(5 * np.log(10))
    file.write_text("0.5 1\n2 0.25\n\n9 1e-3\n")
    marks = units.parse_fading(f"table:{file}*rayleigh")
    assert isinstance(marks.factors[0], FadingTable)


REFUSED = [
    (units.parse_densities, "1:10:3", r"--densities must be LOW:HIGH:COUNT/km2.*got '1:10:3': the unit is missing"),
    (units.parse_densities, "1:10:3/km", "'km' is not one of its units"),
    (units.parse_densities, "1:10/km2", "a grid is LOW:HIGH:COUNT"),
    (units.parse_densities, "10:1:3/km2", "0 < LOW < HIGH"),
    (units.parse_densities, "0:1:3/km2", "0 < LOW < HIGH"),
    (units.parse_densities, "1:10:1/km2", "COUNT is a whole number from 2 to 1024"),
    (units.parse_densities, "1:10:2.5/km2", "COUNT is a whole number from 2 to 1024"),
    (units.parse_densities, "-1/km2", "a density is positive"),
    (units.parse_densities, "nan/km2", "'nan' is not a finite number"),
    (units.parse_densities, "1e999/km2", "'1e999' is not a finite number"),
    (units.parse_densities, "/km2", "'' is not a finite number"),
    (units.parse_densities, ",".join(["1"] * 1025) + "/km2", "there may be 1024 densities"),
    (units.parse_thresholds, "0,3", r"--thresholds must be LOW:HIGH:STEPdB.*the unit is missing"),
    (units.parse_thresholds, "0dB,1x", "dB and linear do not mix"),
    (units.parse_thresholds, "0dB,3dB", "one unit, at the end, holds for all"),
    (units.parse_thresholds, "200dB", "thresholds are -180 to 180 dB"),
    (units.parse_thresholds, "1e-19x", "thresholds are -180 to 180 dB"),
    (units.parse_thresholds, "0:181:1dB", "thresholds are -180 to 180 dB"),
    (units.parse_thresholds, "0x", "a linear threshold is positive"),
    (units.parse_thresholds, "-1,2x", "a linear threshold is positive"),
    (units.parse_thresholds, "0:3:-1dB", "STEP > 0"),
    (units.parse_thresholds, "3:0:1dB", "LOW <= HIGH"),
    (units.parse_thresholds, "0:1:1e-6dB", "at most 1024"),
    (units.parse_thresholds, "1:2:1x", "a grid is LOW:HIGH:STEPdB"),
    (units.parse_thresholds, "0;3dB", "'0;3' is not a finite number"),
    (units.parse_noise, "-92dBm", "in dBm it needs the transmit power"),
    (units.parse_noise, "-1x", "noise is not negative"),
    (units.parse_noise, "1e-12", r"--noise must be 0, -92dBm, .*got '1e-12': the unit is missing"),
    (units.parse_noise, "1e-12W", "'W' is not one of its units"),
    (units.parse_noise, "loud", "--noise must be 0, -92dBm"),
    (units.parse_power_dbm, "30", "--transmit-power must be 30dBm, 1W or 100mW, got '30': the unit is missing"),
    (units.parse_power_dbm, "0W", "a power is positive"),
    (units.parse_path_loss, "4", "--path-loss must be slope:4, ms:0@10m,4, .*got '4'"),
    (units.parse_path_loss, "ms:0@10,4", "--path-loss, breakpoint must be a length.*got '10': the unit is missing"),
    (units.parse_path_loss, "ms:0,4", "every exponent but the last has its breakpoint"),
    (units.parse_path_loss, "ms:0@10m,4@20m", "every exponent but the last has its breakpoint"),
    (units.parse_path_loss, "slope:x", "'x' is not a finite number"),
    (units.parse_path_loss, "slope:2", "--path-loss 'slope:2': MultiSlope: the last exponent must be above 2"),
    (units.parse_path_loss, "ms:4@10m,3", "exponents must be strictly increasing"),
    (units.parse_path_loss, "slope:4;h=10", "--path-loss, h= must be a length with its unit"),
    (units.parse_path_loss, "slope:4;h=-1m", "a length is not negative"),
    (units.parse_path_loss, "slope:4;up=1m", "'up=1m' is none of h=, min=, rinf="),
    (units.parse_path_loss, "slope:4;h=1m;h=2m", "h= is given twice"),
    (units.parse_path_loss, "stretched:1", "--path-loss must be"),
    (units.parse_path_loss, "table:/nowhere.txt", "cannot read the table"),
    (units.parse_fading, "rician:3dB", "'rician:3dB' is none of them"),
    (units.parse_fading, "rayleigh:1", "'rayleigh:1' is none of them"),
    (units.parse_fading, "rayleigh*", "'' is none of them"),
    (units.parse_fading, "lognormal:8", "lognormal takes dB: the unit is missing"),
    (units.parse_fading, "pareto:3dB", "pareto takes a plain number, not dB"),
    (units.parse_fading, "pareto:-1", "--fading 'pareto:-1': Pareto: alpha must be 0.001 to 100"),
    (units.parse_fading, "nakagami:0", "Nakagami: m must be 0.01 to 1000"),
    (units.parse_fading, "lognormal:-8dB", "LogNormal: db must be 0 to 300"),
    (units.parse_fading, "gamma:", "'gamma:' is none of them"),
]


@pytest.mark.parametrize("parse, text, message", REFUSED)
def test_refusals_name_field_and_form(parse, text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


@pytest.mark.parametrize("field", ["--lengths, h="])
def test_a_field_of_another_name_is_named(field):
    with pytest.raises(UserError, match="^--lengths, h= must be a length with its unit: 10m, 40km or 5cm, got '3'"):
        units.parse_length_m("3", field)


@pytest.mark.parametrize(
    "content, message",
    [
        ("1 2 3\n", "line 1 of the table must be two numbers, got '1 2 3'"),
        ("1 2\nx 3\n", "line 2 of the table must be two numbers"),
        ("# nothing\n", "the table must have at least 2 lines, got 0"),
        ("1 0.9\n2 0.5\n", "survival must begin with 1"),
    ],
)
def test_bad_tables_are_refused_by_line(tmp_path, content, message):
    file = tmp_path / "marks.txt"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        units.parse_fading(f"table:{file}")
