"""Bad input of sample_power_domain, sample_geometry and rayleigh_conditional: one sentence each, the same on every
backend, before any kernel runs."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from sinr_oracle import OPS, family, geometry_network, moved_by_one, op_arguments, power_network, sample

from tokenweave_ops import SinrGrid

GRID = SinrGrid.make([0.5, 2.0], [1.0, 2.0, 4.0])

pytestmark = pytest.mark.no_launch


def network(op: str):
    return power_network("4") if op == "sample_power_domain" else geometry_network("height, tabulated")


def assert_refused(backend, op: str, message: str, **changes) -> None:
    """The op as the public function calls it, but for some arguments, named as in the schema."""
    given = op_arguments(op, network(op).to(backend.device), GRID.to(backend.device))
    for name, value in changes.items():
        assert name in given, name
        given[name] = value(given[name]) if callable(value) else value
    with pytest.raises(RuntimeError) as error:
        getattr(backend.ops, op)(*given.values())
    device = "cuda:0" if backend.name == "cuda" else "cpu"
    assert str(error.value).splitlines()[0] == f"{op}: {message}".replace("{device}", device)


def ops_with(name: str) -> list[str]:
    schemas = {op: getattr(family, f"_{op}")._schema for op in OPS}
    return [op for op in OPS if any(argument.name == name for argument in schemas[op].arguments)]


# ---------------------------------------------------------------------------------------------------------- in Python


@pytest.mark.parametrize("op", OPS[:2])
def test_residual(backend, op):
    with pytest.raises(ValueError, match=f"^{op}: residual must be none, mean or gauss, got 'normal'$"):
        sample(backend, op, network(op), GRID, num_realisations=1, residual="normal")


@pytest.mark.parametrize("op", OPS[1:])
def test_association(backend, op):
    with pytest.raises(ValueError, match=f"^{op}: association must be strongest or nearest, got 'best'$"):
        sample(backend, op, network(op), GRID, num_realisations=1, association="best")


def test_thresholds_of_the_strongest_cell(backend):
    grid = SinrGrid.make([1.0], [2.0, 0.5])
    message = "^rayleigh_conditional: thresholds must be at least 1 for the strongest cell, got 0.5$"
    with pytest.raises(ValueError, match=message):
        sample(backend, OPS[2], network(OPS[2]), grid, num_realisations=1, association="strongest")


# ----------------------------------------------------------------------------------------------------------- numbers

TOO_MANY = 2**30 + 1
BAD_NUMBERS = [
    ("num_realisations", [0, -1, TOO_MANY], "1 to 1073741824"),
    ("first_realisation", [-16384, 1, 16383, 2**63 - 16384], "a multiple of 16384 from 0 on"),
    ("num_terms", [0, 3, 6, 68, -4], "a multiple of 4, 4 to 64"),
    ("rate_nodes", [-1, 17], "0 to 16"),
    ("residual", [-1, 3], "0 to 2"),
    ("noise", [-1.0, nan, inf, -inf], "at least 0 and finite"),
    ("activity", [0.0, -0.5, 1.5, nan, inf], "above 0, at most 1"),
    ("cut", [0.0, -1.0, nan], "above 0"),
    ("height", [-1.0, nan, inf], "at least 0 and finite"),
    ("min_distance", [-1.0, nan, inf], "at least 0 and finite"),
    ("r_inf", [-1.0, nan], "at least 0"),
    ("r_inf", [0.0], "above 0"),
    ("r_inf", [1e-25], "at least 1e-22"),
    ("height", [1e20], "at most 1.8e19"),
    ("min_distance", [1e300], "at most 1.8e19"),
    ("r_inf", [1e20], "at most 1.8e19"),
    ("mark_mean", [-1.0, nan, inf], "at least 0 and finite"),
    ("mark_second_moment", [-1.0, nan, inf], "at least 0 and finite"),
]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [(name, value, expected) for name, values, expected in BAD_NUMBERS for value in values],
)
def test_numbers(backend, name, value, expected):
    got = f"{value:g}" if isinstance(value, float) else value
    for op in ops_with(name):
        assert_refused(backend, op, f"{name} must be {expected}, got {got}", **{name: value})


@pytest.mark.parametrize(
    ("op", "options", "most"),
    [
        ("sample_geometry", {"nearest": False}, 2**20),
        ("sample_geometry", {"nearest": True}, 2**20),
        ("rayleigh_conditional", {"nearest": True}, 2**20),
        ("rayleigh_conditional", {"nearest": False}, 64),
    ],
)
def test_num_points(backend, op, options, most):
    for value in (0, -4, 2, 7, most + 4):
        message = f"num_points must be a multiple of 4, 4 to {most}, got {value}"
        assert_refused(backend, op, message, num_points=value, **options)


@pytest.mark.parametrize(("mean", "second", "residual"), [(inf, inf, "none"), (1.0, inf, "mean"), (1.0, 2.0, "gauss")])
def test_moments_that_are_not_needed_may_be_infinite(backend, mean, second, residual):
    table = network("sample_geometry")
    table = type(table)(**{**vars(table), "mark_mean": mean, "mark_second_moment": second})
    options = {"num_realisations": 4, "num_points": 4}
    found = sample(backend, "sample_geometry", table, GRID, residual=residual, **options)
    assert found.sums.isfinite().all()
    for worse in ("mean", "gauss"):
        needs = "mark_mean" if mean == inf else "mark_second_moment"
        if residual == "none" or (residual, worse) == ("mean", "gauss"):
            message = f"^sample_geometry: {needs} must be at least 0 and finite, got inf"
            with pytest.raises(RuntimeError, match=message):
                sample(backend, "sample_geometry", table, GRID, residual=worse, **options)


# ------------------------------------------------------------------------------------------------------------- tensors

# name -> what its shape must be, for all ops that take it
SHAPES = {
    "scales": "[densities, 2]",
    "thresholds": "[thresholds]",
    "inverse": "[3, intervals, 4]",
    "measure": "[intervals, 4]",
    "gain": "[slopes, 2] or [1, intervals, 4]",
    "fading": "[2, intervals, 4]",
    "far": "[2, intervals, 4]",
}


@pytest.mark.parametrize("name", SHAPES)
def test_tensors(backend, name):
    where = "(dtype fp32, device {device})"
    for op in ops_with(name):
        shape = list(op_arguments(op, network(op), GRID)[name].shape)

        def refused(change, expected, got, where=where, op=op):
            assert_refused(backend, op, f"{name} must {expected}, got {got} {where}", **{name: change})

        other = "(dtype fp64, device {device})"
        refused(lambda t: t.double(), "be fp32", "fp64", where=other)
        refused(lambda t: t[..., None].clone(), f"have shape {SHAPES[name]}", [*shape, 1])
        if name != "thresholds":
            refused(lambda t: t[..., :1].clone(), f"have shape {SHAPES[name]}", [*shape[:-1], 1])
        doubled = [2 * size for size in torch.empty(shape).stride()]
        refused(lambda t: torch.stack([t, t], dim=-1)[..., 0], "be contiguous", f"strides {doubled}")


@pytest.mark.parametrize("name", ["inverse", "gain", "fading", "far"])
def test_planes_and_intervals_of_tables(backend, name):
    where = "(dtype fp32, device {device})"
    for op in ops_with(name):
        planes, count, _ = op_arguments(op, network(op), GRID)[name].shape
        for shape in ([planes + 1, count, 4], [planes, 0, 4]):
            message = f"{name} must have shape {SHAPES[name]}, got {shape} {where}"
            assert_refused(backend, op, message, **{name: lambda t, shape=shape: t.new_zeros(shape)})
        most = 2048 if name == "fading" else 4096  # both planes of which must fit beside the gain's
        message = f"{name} must have at most {most} intervals, got {most + 1} {where}"
        assert_refused(
            backend, op, message, **{name: lambda t, planes=planes, most=most: t.new_zeros(planes, most + 1, 4)}
        )


@pytest.mark.parametrize("name", ["inverse", "measure", "gain", "fading", "far"])
def test_alignment_of_tables(backend, name):
    for op in ops_with(name):
        message = f"{name} must be aligned to 16 bytes, got another address (dtype fp32, device {{device}})"
        assert_refused(backend, op, message, **{name: moved_by_one})


def test_too_many_slopes(backend):
    for op in OPS[1:]:
        message = "gain must have at most 64 slopes, got 65 (dtype fp32, device {device})"
        assert_refused(backend, op, message, gain=lambda t: t.new_zeros(65, 2))


@pytest.mark.parametrize("name", ["inverse", "gain", "fading", "far"])
def test_keys_of_a_table(backend, name):
    """The intervals of a table must lie among the positive numbers."""
    for op in ops_with(name):
        given = op_arguments(op, network(op), GRID)
        steps, count = given[f"{name}_steps"], given[name].shape[1]
        most = (0x7F800000 >> (23 - steps)) - count
        for value in (0, -1, most + 1, 2**40):
            message = f"{name}_key must be 1 to {most}, got {value}"
            assert_refused(backend, op, message, **{f"{name}_key": value})
        for value in (-1, 11):
            message = f"{name}_steps must be 0 to 10, got {value}"
            assert_refused(backend, op, message, **{f"{name}_steps": value})


def test_sides_of_the_measure(backend):
    op = "sample_power_domain"
    count = op_arguments(op, network(op), GRID)["measure"].shape[0]
    for value in (0, -1, count, count + 1):
        message = f"measure_negative must be 1 to {count - 1}, got {value}"
        assert_refused(backend, op, message, measure_negative=value)
    for value in (-1, 11):
        assert_refused(backend, op, f"measure_steps must be 0 to 10, got {value}", measure_steps=value)
    message = "measure must have at most 4096 intervals, got 4097 (dtype fp32, device {device})"
    assert_refused(backend, op, message, measure=lambda t: t.new_zeros(4097, 4))
    message = "measure must end before the largest fp32 number, got 200 intervals (dtype fp32, device {device})"
    changes = {"measure": lambda t: t.new_zeros(200, 4), "measure_steps": 0}
    for value in (2, 198):
        assert_refused(backend, op, message, measure_negative=value, **changes)


def test_tensors_on_another_device(cuda):
    for op in OPS:
        for name in SHAPES:
            if name != "scales" and op in ops_with(name):
                message = f"{name} must be on the device of scales, cuda:0, got cpu (dtype fp32, device cpu)"
                assert_refused(cuda, op, message, **{name: lambda t: t.cpu()})


@pytest.mark.parametrize("op", OPS)
def test_no_gradient(backend, op):
    """The ops say nothing about gradients, and what they return has none."""
    given = op_arguments(op, network(op).to(backend.device), GRID.to(backend.device))
    given["scales"] = given["scales"].clone().requires_grad_()
    with torch.no_grad():
        assert not any(result.requires_grad for result in getattr(backend.ops, op)(*given.values()))
