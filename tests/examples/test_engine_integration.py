"""An engine's model, patched, computes what it did before."""

import re


def test_engine_integration(run_example):
    printed = run_example("engine_integration.py")
    lines = re.findall(r"^(.+?) +error against float64 ([\d.]+) \(limit ([\d.]+)\)", printed, re.MULTILINE)
    assert [name for name, *_ in lines] == ["unpatched", "patched", "patched, compiled"]
    for _, error, limit in lines:
        assert 0 < float(error) <= float(limit)
    assert "4 row-parallel GEMMs now write into Workspace" in printed
