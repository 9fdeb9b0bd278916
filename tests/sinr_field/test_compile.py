"""torch's own view of the ops: opcheck, fake tensors, torch.compile with fullgraph."""

from __future__ import annotations

import pytest
import torch
from sinr_oracle import OPS, family, geometry_network, op_arguments, power_network

from tokenweave_ops import SinrGrid

GRID = SinrGrid.make([0.5, 2.0], [1.0, 2.0, 4.0])


def arguments(backend, op: str, **options) -> tuple:
    table = power_network("4") if op == "sample_power_domain" else geometry_network("4")
    return tuple(op_arguments(op, table.to(backend.device), GRID.to(backend.device), **options).values())


@pytest.mark.parametrize("keep_samples", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(backend, op, keep_samples):
    given = arguments(backend, op, num_realisations=40, keep_samples=keep_samples)
    torch.library.opcheck(getattr(backend.ops, op).default, given)


@pytest.mark.parametrize("num_realisations", [1, 16384, 16385])
@pytest.mark.parametrize("keep_samples", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_fake_outputs_have_the_real_metadata(backend, op, keep_samples, num_realisations):
    size = {"num_terms": 4} if op == "sample_power_domain" else {"num_points": 4}
    options = {"num_realisations": num_realisations, "keep_samples": keep_samples, **size}
    given = arguments(backend, op, **options)
    fakes = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in given]
    real, fake = (getattr(backend.ops, op)(*values) for values in (given, fakes))
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
        assert other.device.type == "meta"


@pytest.mark.no_launch
@pytest.mark.parametrize("op", OPS)
def test_schemas_write_nothing(backend, op):
    schema = getattr(backend.ops, op).default._schema
    assert not schema.is_mutable and [result.name for result in schema.returns] == ["sums", "histogram", "samples"]


def sweep(power, geometry, grid, noise: float, num_realisations: int):
    """A slice of an analysis: three samplers and what a caller does with their results."""
    run = {"num_realisations": num_realisations, "noise": noise, "seed": 5}
    one = family.sample_power_domain(power, grid, **run)
    two = family.sample_geometry(geometry, grid, num_points=16, association="nearest", keep_samples=True, **run)
    three = family.rayleigh_conditional(geometry, grid, num_points=16, **run)
    return one.coverage.mean, one.sums + 1, two.samples.amax(1), three.histogram * 2


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph_equals_eager(backend, dynamic):
    tables = power_network("4").to(backend.device), geometry_network("4").to(backend.device)
    torch._dynamo.reset()
    # Generated code where it differs between backends: outputs of the ops feed it, their inner working does not.
    compiler = "inductor" if backend.name != "simt" and not dynamic else "aot_eager"
    runs = [([0.5, 2.0], 300), ([0.5, 2.0, 3.0], 500)] if dynamic else [([0.5, 2.0], 300)]
    with backend.use(family):
        compiled = torch.compile(sweep, fullgraph=True, dynamic=dynamic, backend=compiler)
        for densities, num_realisations in runs:
            given = (*tables, SinrGrid.make(densities, [1.0, 2.0], backend.device), 0.1, num_realisations)
            for one, other in zip(sweep(*given), compiled(*given), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_not_written(backend, op):
    given = arguments(backend, op, num_realisations=40)
    before = [value.clone() if isinstance(value, torch.Tensor) else value for value in given]
    getattr(backend.ops, op)(*given)
    for one, other in zip(before, given, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
