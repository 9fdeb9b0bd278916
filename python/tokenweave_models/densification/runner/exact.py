"""Coverage and rate by formulas, which of them, and the asymptotes of a dense network beside them."""

from __future__ import annotations

import argparse
from math import inf

import numpy as np

from tokenweave_models.common.console import print_table, print_text
from tokenweave_models.densification import units
from tokenweave_models.densification.exact import nearest, saturation, strongest
from tokenweave_models.densification.fading import Rayleigh
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.runner import options, plots
from tokenweave_models.densification.runner.reporting import (
    escaped,
    plain,
    print_regime_words,
    print_result,
    title_of,
    written,
)
from tokenweave_models.densification.runner.sampling import save, sweep_with_bar


def run(arguments: argparse.Namespace) -> None:
    options.check_results(arguments.out, arguments.plot)
    network = options.network_of(arguments)
    densities = units.parse_densities(arguments.densities)
    thresholds_db = units.parse_thresholds(arguments.thresholds)
    rate = not arguments.no_rate
    options.check_rate(network, rate)
    result = sweep_with_bar(
        "integrating", network, densities, thresholds_db, method="exact", rate=rate, **options.provenance_of(arguments)
    )
    print_result(title_of(network), result)
    asymptotes = asymptotes_of(network, densities, 10 ** (thresholds_db[0] / 10))
    if asymptotes:
        print_table(
            "What a dense network tends to",
            ("density, /km2", *(escaped(name.format(f"{thresholds_db[0]:g}")) for name in asymptotes)),
            [
                (f"{density:.4g}", *(plain(values[row]) for values in asymptotes.values()))
                for row, density in enumerate(densities)
            ],
        )
    print_text("Formulas have no error bars; their accuracy is in the docstrings of the laws.")
    print_regime_words(result)
    save(result, arguments.out)
    if arguments.plot is not None:
        plots.draw_sweeps(arguments.plot, {"": result})
        written(arguments.plot)


def asymptotes_of(network: Network, densities_per_km2: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    """By name, with {} for the threshold in dB: values at each density. Empty where nothing is known."""
    densities, regime = network.scaled_density(densities_per_km2), network.regime()
    if network.association == "nearest":
        return _nearest_asymptotes(network, densities, threshold)
    found = {}
    if regime.name == "saturation" and network.activity == 1:
        found["P(SINR > {} dB)"] = np.full(len(densities), float(saturation.coverage(regime.rho, threshold)))
        found["rate, nats/s/Hz"] = np.full(len(densities), saturation.rate(regime.rho))
    elif regime.name == "deficit" and network.activity == 1:
        if regime.rho < inf and regime.kappa < inf:
            found["P(SINR > {} dB)"] = strongest.deficit_coverage(regime, densities, threshold)
            found["rate, nats/s/Hz"] = strongest.deficit_rate(regime, densities)
        found["E[M] / E[S], of the rate"] = np.array(
            [strongest.mean_share(network.power_measure, density) for density in densities]
        )
    return found


def _nearest_asymptotes(network: Network, densities: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    law = network.path_loss
    if type(network.fading) is not Rayleigh or network.activity < 1:
        return {}
    if law.near_exponent > 0 and law.near_exponent != 2:
        mean_power = network.power_measure.mean_power if law.near_exponent < 2 else inf
        limits = [nearest.high_density_coverage(law, mean_power, one, threshold) for one in densities]
        return {"P(SINR > {} dB)": np.array(limits)}
    if law.is_bounded:  # density * rate tends to a constant
        limit = nearest.bounded_ase_limit(law, network.power_measure.mean_power)
        return {"rate, nats/s/Hz": limit / densities}
    return {}
