"""A sweep on two ranks has the bits of one process."""

import re


def test_densification_on_ranks(run_example):
    printed = run_example("densification_on_ranks.py")
    assert "on 2 ranks" in printed and "one process alone: the same bits" in printed
    rows = re.findall(r"^ +[\d.e+]+((?: +0\.\d+ \(0\.\d+\)){3})$", printed, re.MULTILINE)
    coverage = [[float(cell) for cell in re.findall(r"(0\.\d+) \(", row)] for row in rows]
    assert len(coverage) == 4
    assert all(one > two > three > 0 for one, two, three in coverage)
    assert coverage[0][1] > 5 * coverage[3][1]  # density harms where the near slope is 1.5 and the tail light
