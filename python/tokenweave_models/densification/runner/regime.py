"""What theory says of a dense network of these laws."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from math import inf

from tokenweave_models.common.console import print_table, print_text
from tokenweave_models.common.output import check_output
from tokenweave_models.densification.runner import options
from tokenweave_models.densification.runner.reporting import escaped, plain, print_warnings, title_of, write_report

NAMES = {"coverage": "coverage", "rate": "rate", "coverage_density": "coverage density", "ase": "ASE"}


def run(arguments: argparse.Namespace) -> None:
    check_output(arguments.json)
    network = options.network_of(arguments)
    with options.refused_in_words():
        regime = network.regime()
    numbers = {
        "rho = min(alpha, 2 / beta_0)": regime.rho,
        "alpha, tail index of the fading": regime.alpha,
        "2 / beta_0, of the near field": regime.delta_0,
        "kappa, of L1(x) ~ kappa x^-rho": regime.kappa,
        "mean power per unit of density": regime.mean_power,
    }
    moments = {
        name: ("yes" if value else "no") if name.startswith("E ln") else ("infinite" if value == inf else plain(value))
        for name, value in regime.moments.items()
    }
    print_table(
        title_of(network),
        ("of the power measure", "value"),
        [(name, plain(value)) for name, value in numbers.items()]
        + [(escaped(name), value) for name, value in moments.items()],
    )
    print_table(
        "As the density grows",
        ("metric", "exponent of density", "law"),
        [(NAMES[metric], plain(regime.exponents[metric]), regime.laws[metric]) for metric in NAMES],
    )
    print_text(f"Theory: {regime.words}")
    print_text(
        f"The unit of length is {network.path_loss.unit_m:g} m; powers are relative to the gain there, "
        f"{network.path_loss.gain_at_unit:.4g}."
    )
    print_warnings(regime.warnings)
    write_report(arguments.json, {"network": network.describe(), "regime": asdict(regime)})
