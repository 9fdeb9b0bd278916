"""The piecewise cubics and the grids that the kernels read: how close they are, what they refuse."""

from __future__ import annotations

import re
from math import inf, log2, nan, pi

import numpy as np
import pytest
import torch
from sinr_oracle import flat_near_field, geometry_network, power_network, reference

from tokenweave_ops import GeometryTable, LogTable, PowerTable, SinrGrid, TwoSidedTable, mark_table
from tokenweave_ops._sinr_tables import MAX_DENSITIES, MAX_INTERVALS, MAX_THRESHOLDS, SMALLEST_LOG2, measure_range


def spread(low: float, high: float, count: int = 20_001) -> torch.Tensor:
    """Positive numbers that fp32 holds exactly."""
    return torch.logspace(np.log10(low), np.log10(high), count, dtype=torch.float64).float().double()


# ----------------------------------------------------------------------------------------------------------- LogTable


@pytest.mark.parametrize("log2_steps", [0, 2, 4, 6])
def test_log_table_error_falls_with_the_fourth_power_of_the_step(log2_steps):
    table = LogTable.fit(np.log2, 1e-3, 1e3, log2_steps=log2_steps)
    x = spread(1e-3, 1e3)
    error = (table.evaluate(x) - x.log2()).abs().max().item()
    # h^4 / 1944 times the largest fourth derivative, 6 / ln 2 for intervals of length h from 1 on, and rounding
    assert error < 2.0 ** (-4 * log2_steps) * 6 / np.log(2.0) / 1944 * 1.1 + 4e-7 * 10
    assert log2_steps > 2 or error > 2.0 ** (-4 * log2_steps) * 1e-4


def test_log_table_planes_and_neighbours():
    table = LogTable.fit(lambda x: np.stack([np.log2(x), x]), 0.5, 8.0)
    assert table.coefficients.shape == (2, 4 * 16 + 1, 4) and table.coefficients.dtype == torch.float32
    x = spread(0.5, 8.0)
    assert (table.evaluate(x, plane=1) - x).abs().max() < 1e-6
    knots = torch.exp2(torch.arange(-1, 4).double())
    below = torch.nextafter(knots.float(), torch.tensor(0.0)).double()
    assert (table.evaluate(knots) - table.evaluate(below)).abs().max() < 1e-6, "no jump at a border"


def test_log_table_clamps():
    table = LogTable.fit(np.log2, 1.0, 4.0)
    ends = table.evaluate(torch.tensor([0.0, 1e-40, 0.9, 1.0, 4.25, 5.0, 3e38, inf], dtype=torch.float64))
    assert (ends[:4] == 0.0).all()
    assert (ends[4:] == ends[-1]).all() and abs(ends[-1] - log2(4.25)) < 1e-6


def test_log_table_takes_minus_infinity_for_nothing():
    with np.errstate(divide="ignore"):
        table = LogTable.fit(lambda x: np.log2(np.maximum(x - 2.0, 0.0)), 1.0, 4.0)
    assert table.evaluate(torch.tensor([1.5]))[0] == SMALLEST_LOG2


@pytest.mark.parametrize("value", [nan, inf])
def test_log_table_refuses_values(value):
    with pytest.raises(ValueError, match="^a tabulated function must be finite or -inf$"):
        LogTable.fit(lambda x: x * value, 1.0, 2.0)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, 1.0), (1.0, inf), (nan, 1.0)])
def test_log_table_refuses_ranges(low, high):
    with pytest.raises(ValueError, match="^the range must be 0 < low < high < 3e38, got "):
        LogTable.fit(np.log2, low, high)


def test_log_table_refuses_what_fp32_cannot_hold():
    with pytest.raises(ValueError, match="values that fp32 can hold"):
        LogTable.fit(lambda x: 1e39 + 0 * x, 1.0, 2.0)
    with pytest.raises(ValueError, match="must end at a normal fp32 number"):
        LogTable.fit(np.log2, 1e-40, 1e-39)


def test_marks_may_be_as_fine_as_the_op_takes():
    """Two planes of 2,048 intervals; words next to the middle are looked up in the last one."""
    table = mark_table(np.log2, log2_steps=6)
    assert table.coefficients.shape == (2, 2048, 4)
    y = torch.tensor([2.0**-33, 1e-3, 0.5 - 2.0**-24, 0.5])
    for plane, e in enumerate((-torch.log1p(-y.double()), -y.double().log())):
        assert (table.evaluate(y, plane) - e.log2()).abs().max() < 1e-6


def test_log_table_refuses_sizes():
    with pytest.raises(ValueError, match=f"would need .* intervals, at most {MAX_INTERVALS} fit; lower log2_steps"):
        LogTable.fit(np.log2, 1e-30, 1e30, log2_steps=6)
    with pytest.raises(ValueError, match="^log2_steps must be 0 to 10, got 11$"):
        LogTable.fit(np.log2, 1.0, 2.0, log2_steps=11)


# ------------------------------------------------------------------------------------------------------ TwoSidedTable


def test_two_sided_table_is_close():
    table = TwoSidedTable.fit(np.tanh, -50.0, 30.0)
    z = torch.linspace(-50.0, 30.0, 40_001, dtype=torch.float64).float().double()
    assert (table.evaluate(z) - z.tanh()).abs().max() < 2e-7
    assert table.coefficients.shape[0] > table.negative > 0


def test_two_sided_table_clamps():
    table = TwoSidedTable.fit(lambda z: z, -2.0, 4.0)
    below, above = table.evaluate(torch.tensor([-1e38, 1e38], dtype=torch.float64)).tolist()
    assert -2.1 < below <= -2.0 and 4.0 <= above < 4.2
    assert table.evaluate(torch.tensor([-inf, inf], dtype=torch.float64)).tolist() == [below, above]
    assert abs(table.evaluate(torch.tensor([0.0]))[0]) < 1e-9


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 0.0), (1.0, 2.0), (-inf, 1.0), (-1.0, inf), (nan, 1.0)])
def test_two_sided_table_refuses_ranges(low, high):
    with pytest.raises(ValueError, match="^the range must be low < 0 < high, got "):
        TwoSidedTable.fit(np.tanh, low, high)


# ------------------------------------------------------------------------------------------ tables of whole networks


@pytest.mark.parametrize("name", ["2.5", "4", "20", "flat", "disc"])
def test_power_table_is_its_own_inverse(name):
    """L1(P(g)) = g, and the mean and variance beyond g are integrals of P and P^2."""
    table = power_network(name)
    g = spread(1e-9, min(1e4, 0.99 * table.cut))
    power = table.inverse.evaluate(g)
    # log2 of the power is rounded to fp32 on the way; "flat" has powers where the measure is 24 times as steep.
    rounded = power.abs().max().item() * 2.0**-22
    steep = {"flat": 24.0, "20": 0.1}.get(name, 1.0)
    assert (table.measure.evaluate(power) - g.log2()).abs().max() < steep * rounded + 30 * 2.0**-22
    assert (power.diff() < 0).all()

    for plane, exponent, factor in ((1, 1, 1.0), (2, 2, 0.5)):
        beyond = torch.exp2(table.inverse.evaluate(g, plane=plane) / factor)
        between = torch.trapezoid(torch.exp2(exponent * power) * g, g.log())
        assert between.item() == pytest.approx((beyond[0] - beyond[-1]).item(), rel=1e-3)
        assert (beyond[1:] <= beyond[:-1] * (1 + 1e-5)).all()


def test_flat_near_field_has_the_tails_it_should():
    """The oracle's own measure: all of the disc r < 1 fades like e^-x, what lies beyond like x^-1/2."""
    assert flat_near_field(np.array([-60.0]))[0] == pytest.approx(30 + log2(pi**1.5 / 2), abs=1e-6)
    x = 2.0**8
    assert flat_near_field(np.array([8.0]))[0] == pytest.approx(log2(pi) - x / np.log(2) + log2(1 + 0.5 / x), abs=1e-4)


@pytest.mark.parametrize("exponent", [2.0, 0.0, -1.0, nan])
@pytest.mark.parametrize("kind", [PowerTable, GeometryTable])
def test_single_slope_refuses_exponents(kind, exponent):
    with pytest.raises(ValueError, match=f"^exponent must be above 2, or interference is infinite; got {exponent}$"):
        kind.single_slope(exponent)


@pytest.mark.parametrize("constant", [0.0, -1.0, inf, nan])
def test_single_slope_refuses_constants(constant):
    with pytest.raises(ValueError, match=f"^constant must be positive and finite, got {constant}$"):
        PowerTable.single_slope(4.0, constant=constant)


@pytest.mark.parametrize("densities", [(0.0, 1.0), (2.0, 1.0), (1.0, inf), (nan, 1.0)])
def test_measure_range_refuses_densities(densities):
    with pytest.raises(ValueError, match="^densities must be a positive range, got "):
        measure_range(densities)


def test_measure_range_holds_every_arrival():
    low, high = measure_range((1e-2, 1e4))
    assert low <= 2.0**-33 / 1e4 and high >= 64 / 1e-2
    assert measure_range((1e-37, 1e37)) == (2e-38, 1e38)


@pytest.mark.parametrize("name", ["4", "2.5", "dual slope", "height", "disc"])
def test_far_field_is_the_integral_of_the_gain(name):
    table = geometry_network(name)
    s = spread(1e-4, min(1e6, 0.999 * table.r_inf**2), 200_001)
    gain = reference.log2_gain(table, s)
    for plane, exponent, factor in ((0, 1, 1.0), (1, 2, 0.5)):
        beyond = torch.exp2(table.far.evaluate(s, plane=plane) / factor)
        between = pi * torch.trapezoid(torch.exp2(exponent * gain) * s, s.log())
        assert between.item() == pytest.approx((beyond[0] - beyond[-1]).item(), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------- SinrGrid


def test_grid():
    grid = SinrGrid.make([0.5, 4], [1, 10.0])
    assert grid.densities == (0.5, 4.0) and grid.thresholds == (1.0, 10.0)
    assert grid.scales.tolist() == [[2.0, -1.0], [0.25, 2.0]] and grid.scales.dtype == torch.float32
    assert grid.log2_thresholds.tolist() == torch.tensor([1.0, 10.0]).log2().tolist()
    empty = SinrGrid.make([])
    assert empty.scales.shape == (0, 2) and empty.log2_thresholds.shape == (0,)


@pytest.mark.parametrize("value", [0.0, -1.0, nan, inf, 1e26, 1e-26])
def test_grid_refuses_values(value):
    with pytest.raises(
        ValueError, match=rf"^SinrGrid: densities must be 1e-25 to 1e\+25, got {re.escape(str(value))}$"
    ):
        SinrGrid.make([1.0, value])
    message = rf"^SinrGrid: thresholds must be 1e-18 to 1e\+18, linear and not in dB, got {re.escape(str(value))}$"
    with pytest.raises(ValueError, match=message):
        SinrGrid.make([1.0], [value])


def test_grid_refuses_sizes():
    with pytest.raises(ValueError, match=f"^SinrGrid: densities must be at most {MAX_DENSITIES} numbers, got 1025$"):
        SinrGrid.make([1.0] * 1025)
    with pytest.raises(ValueError, match=f"^SinrGrid: thresholds must be at most {MAX_THRESHOLDS} numbers, got 1025$"):
        SinrGrid.make([1.0], [1.0] * 1025)
