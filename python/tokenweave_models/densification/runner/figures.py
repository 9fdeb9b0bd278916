"""What F1 to F8 show, and how each is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from math import inf
from pathlib import Path

import numpy as np

from tokenweave_models.common.console import print_text, progress
from tokenweave_models.common.errors import UserError
from tokenweave_models.densification import transmission, units
from tokenweave_models.densification.exact import nearest, saturation
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.ordering import compare
from tokenweave_models.densification.result import Result
from tokenweave_models.densification.runner import bench, phase, plots
from tokenweave_models.densification.runner.options import make_network
from tokenweave_models.densification.runner.plots import COLOURS, MARKERS, canvas, draw_line, finish
from tokenweave_models.densification.runner.sampling import sweep_with_bar
from tokenweave_models.densification.samplers import Settings
from tokenweave_models.densification.sweep import sweep

# Thermal noise of -174 dBm/Hz over 20 MHz with a noise figure of 9 dB is -92 dBm; a transmitter sends 30 dBm. The path
# loss is 1 at 1 m, so the 38 dB that are lost within the first metre are in the noise.
NOISE = "-54dBm"
TRANSMIT_POWER = "30dBm"
DENSITIES = "1e-1:1e6:29/km2"
LIGHT = "rayleigh*lognormal:8dB"
CASES = {  # label: path loss, fading
    r"$\beta_0$ = 3, Rayleigh-lognormal ($\rho$ = 2/3)": ("ms:3@10m,4;rinf=40km", LIGHT),
    r"$\beta_0$ = 1.5, Rayleigh-lognormal ($\rho$ = 4/3)": ("ms:1.5@10m,4;rinf=40km", LIGHT),
    r"$\beta_0$ = 0, Rayleigh-lognormal ($\rho = \infty$)": ("ms:0@10m,4;rinf=40km", LIGHT),
    r"$\beta_0$ = 0, Pareto 0.5 ($\rho$ = 0.5)": ("ms:0@10m,4;rinf=40km", "pareto:0.5"),
    r"$\beta_0$ = 0, Pareto 1.5 ($\rho$ = 1.5)": ("ms:0@10m,4;rinf=40km", "pareto:1.5"),
    r"$\beta_0$ = 0, log-Pareto 2 ($\rho$ = 0)": ("ms:0@10m,4;rinf=40km", "logpareto:2"),
}


@dataclass(frozen=True)
class Study:
    """Where runs are kept, and how long they are."""

    folder: Path
    num_realisations: int
    seed: int
    device: str
    quick: bool

    def sweep(self, name: str, network: Network, densities_per_km2, thresholds_db, **given) -> Result:
        """Goes on from what is kept under this name."""
        checkpoint = self.folder / f"{name}.npz"
        try:
            return sweep_with_bar(
                name, network, densities_per_km2, thresholds_db, num_realisations=self.num_realisations,
                seed=self.seed, device=self.device, checkpoint=checkpoint, **given,
            )  # fmt: skip
        except UserError as error:
            if "checkpoint" not in str(error):
                raise
            raise UserError(f"{checkpoint}: {error}; remove it or take another --folder") from error


@cache  # F1, F2 and F3 show the same runs
def _regimes(study: Study) -> dict[str, Result]:
    densities, radio = units.parse_densities(DENSITIES), {"noise": NOISE, "transmit_power": TRANSMIT_POWER}
    return {
        label: study.sweep(f"regime{number}", make_network(*laws, **radio), densities, [0.0])
        for number, (label, laws) in enumerate(CASES.items(), 1)
    }


def _slopes(results: Mapping[str, Result], quantities: tuple[str, ...]) -> dict:
    """Fitted and predicted exponents, for the report."""
    return {
        label: [asdict(slope) for slope in result.slopes() if slope.quantity in quantities]
        for label, result in results.items()
    }


def _draw_regimes(study: Study, path: Path, quantities: tuple[str, ...]) -> dict:
    results = _regimes(study)
    figure, axes = canvas(1, len(quantities), (5.6 * len(quantities) + 0.4, 5.2))
    for axis, quantity in zip(axes.flat, quantities, strict=True):
        plots.draw_quantity(axis, results, quantity, every=4)
    axes[0, 0].set_ylim(bottom=_BOTTOM.get(quantities[0]))
    finish(figure, path, legend_of=axes[0, 0])
    return {"slopes": _slopes(results, quantities)}


_BOTTOM = {"coverage": 3e-3, "coverage_density": 1e-3}


def draw_f1(study: Study, path: Path) -> dict:
    return _draw_regimes(study, path, ("coverage", "rate"))


def draw_f2(study: Study, path: Path) -> dict:
    return _draw_regimes(study, path, ("coverage_density",))


def draw_f3(study: Study, path: Path) -> dict:
    return _draw_regimes(study, path, ("ase",))


def draw_f4(study: Study, path: Path) -> dict:
    near = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
    tails = [0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, inf]
    densities = units.parse_densities("1e8:1e10:9/km2")
    given = {"num_realisations": max(study.num_realisations // 8, 2**14), "seed": study.seed, "device": study.device}
    cells = []
    with progress() as bar:
        task = bar.add_task("phase", total=len(near) * len(tails))
        for tail_index in tails:
            for near_exponent in near:
                network = phase.network_at(near_exponent, tail_index, 4.0)
                cells.append(phase.fit(network, densities, [0.0], "coverage", **given))
                bar.advance(task)
    plots.draw_phase(path, cells)
    return {"cells": [vars(cell) | {"slope": asdict(cell.slope)} for cell in cells]}


SHAPES = (0.5, 1.0, 2.0, 4.0, 16.0)
SCHEMES = {
    "SISO": transmission.single_antenna(),
    "MRT, 4 antennas": transmission.maximum_ratio(4),
    "OSTBC, 4 antennas": transmission.space_time_code(4),
    "SDMA, 4 antennas, 2 users": transmission.zero_forcing(4, 2),
    "SDMA, 4 antennas, 4 users": transmission.zero_forcing(4, 4),
}


def draw_f5(study: Study, path: Path) -> dict:
    """Left: less variable fading is worse for the strongest cell in a flat near field. Right: multi-antenna schemes."""
    densities = np.geomspace(1e2, 1e5, 25)
    figure, axes = canvas(1, 2, (11.0, 5.2))
    networks = {shape: make_network("ms:0@10m,4", f"nakagami:{shape:g}") for shape in SHAPES}
    for style, (shape, network) in enumerate(networks.items()):
        found = study.sweep(f"nakagami{shape:g}", network, densities, [0.0], rate=False)
        label = f"Nakagami m = {shape:g}"
        draw_line(axes[0, 0], densities, *plots.values_of(found, "coverage"), COLOURS[style], MARKERS[style], label, 4)
    axes[0, 0].set_ylim(1e-6, 1)
    axes[0, 0].set_title("strongest cell, flat within 10 m", fontsize=10, loc="left")
    cell = make_network("ms:1.5@10m,4", association="nearest")
    coverage = {}
    for style, (name, scheme) in enumerate(SCHEMES.items()):
        coverage[name] = transmission.coverage(cell, scheme, densities, [0.0])[:, 0]
        draw_line(axes[0, 1], densities, coverage[name], 0.0, COLOURS[style], MARKERS[style], name, 4)
    axes[0, 1].set_title(r"nearest cell, $\beta_0$ = 1.5 within 10 m, exact", fontsize=10, loc="left")
    for axis in axes.flat:
        plots.logarithmic(axis, "coverage", "0 dB")
        axis.legend(fontsize=8, frameon=False, loc="lower left")
    finish(figure, path)
    # A theorem orders the same shapes on one slope in a disc: there no realisation may be the other way round.
    disc = {shape: make_network("slope:4;rinf=200m", f"gamma:{shape:g}") for shape in SHAPES}
    count = min(study.num_realisations, 2**18)
    violations = {}
    for worse, better in zip(SHAPES[1:], SHAPES, strict=False):
        found = compare(
            disc[better], disc[worse], [1e2, 1e4], [0.0], num_realisations=count, rate=False, seed=study.seed,
            device=study.device,
        )  # fmt: skip
        violations[f"gamma {better:g} above {worse:g}"] = int(found.violations.sum())
    print_text(f"  Realisations that contradict a theorem, of {2 * count} for each pair: {violations}")
    by_scheme = {name: values.tolist() for name, values in coverage.items()}
    return {"violations": violations, "realisations": 2 * count, "coverage": by_scheme}


def draw_f6(study: Study, path: Path) -> dict:
    """From the law of the far slope to that of the near slope."""
    network = make_network("ms:3@10m,4")
    thresholds_db = np.arange(-15.0, 31.0)
    densities = np.array([1e2, 1e3, 1e4, 1e5, 1e6])
    result = study.sweep("ccdf", network, densities, thresholds_db, rate=False)
    y = 10 ** (thresholds_db / 10)
    sparse, dense = saturation.coverage(2 / 4, y), saturation.coverage(2 / 3, y)
    figure, axes = canvas(1, 1, (7.0, 5.2))
    axis = axes[0, 0]
    for row, density in enumerate(densities):
        values, errors = result.coverage[row], result.coverage_se[row]
        label = f"10$^{round(np.log10(density))}$ /km$^2$"
        draw_line(axis, thresholds_db, values, errors, COLOURS[row], MARKERS[row], label, 5)
    axis.plot(thresholds_db, sparse, color="black", linestyle=":", linewidth=1.5, label=r"sparse limit, $\rho$ = 2/4")
    axis.plot(thresholds_db, dense, color="black", linestyle="--", linewidth=1.5, label=r"dense limit, $\rho$ = 2/3")
    axis.set_xlabel("SINR threshold, dB")
    axis.set_ylabel("P(SINR > threshold)")
    axis.set_ylim(0, 1.02)
    axis.legend(fontsize=9, frameon=False, loc="upper right")
    finish(figure, path)
    distances = np.abs(result.coverage - dense).max(axis=1)
    return {"largest distance to the dense limit": dict(zip(densities.astype(str), distances.tolist(), strict=True))}


HEIGHT_M = 10.0
POINTS = 2048  # of the nearest cell's geometry: at 1e6/km2 this is a circle of 26 m, well beyond the height


def draw_f7(study: Study, path: Path) -> dict:
    """Height, and who serves: the strongest cell sampled; the nearest one by formulas, sampled at some densities."""
    densities, sampled = np.geomspace(1e1, 1e6, 26), np.geomspace(1e1, 1e6, 6)
    figure, axes = canvas(1, 2, (11.0, 5.2))
    names = [(association, height_m) for height_m in (0.0, HEIGHT_M) for association in ("strongest", "nearest")]
    worst = 0.0
    for style, (association, height_m) in enumerate(names):
        network = make_network(f"slope:4;h={height_m:g}m", association=association)
        key, label = f"{association}_{height_m:g}m", f"{association} cell, height {height_m:g} m"
        if association == "strongest":
            found = study.sweep(key, network, densities, [0.0])
        else:
            found = sweep(network, densities, [0.0], method="exact")
            points = study.sweep(key, network, sampled, [0.0], method="geometry", settings=Settings(num_points=POINTS))
            exact = sweep(network, sampled, [0.0], method="exact")
            worst = max(worst, float(np.nanmax(np.abs(points.rate_nats - exact.rate_nats) / points.rate_se)))
        for axis, quantity in zip(axes.flat, ("coverage", "ase"), strict=True):
            values, errors = plots.values_of(found, quantity)
            shown = np.where(values > SMALLEST_SHOWN, values, np.nan)
            draw_line(axis, densities, shown, errors, COLOURS[style], "" if association == "nearest" else "o", label, 5)
            if association == "nearest":
                values, errors = plots.values_of(points, quantity)
                shown = np.where(values > SMALLEST_SHOWN, values, np.nan)
                axis.errorbar(
                    sampled, shown, plots.Z95 * errors, color=COLOURS[style], marker="s", markersize=5,
                    linestyle="none", markerfacecolor="white", label="nearest cell, sampled" if height_m else None,
                )  # fmt: skip
    limit = nearest.ase_limit_with_height(4.0, HEIGHT_M) * 1e6
    label = f"limit of the nearest cell, {limit:.4g}"
    axes[0, 1].axhline(limit, color="black", linestyle="--", linewidth=1.1, label=label)
    for axis, quantity in zip(axes.flat, ("coverage", "ase"), strict=True):
        plots.logarithmic(axis, quantity, "0 dB")
        axis.legend(fontsize=8, frameon=False, loc="lower left" if quantity == "coverage" else "upper left")
    axes[0, 0].set_ylim(SMALLEST_SHOWN, 2)
    finish(figure, path)
    return {
        "ase limit of the nearest cell, nats/s/Hz/km2": limit,
        "largest |z| of the rate, sampled against exact": worst,
    }


SMALLEST_SHOWN = 1e-5  # of a coverage


def draw_f8(study: Study, path: Path) -> dict:
    """Two exponents: what is beyond the window matters the more the slower the path loss grows."""
    targets = bench.TARGETS[:2] if study.quick else bench.TARGETS
    runs = {
        f"exponent {exponent:g}": bench.error_against_time(
            targets, exponent=exponent, seed=study.seed, device=study.device
        )
        for exponent in (4.0, 3.0)
    }
    plots.draw_times(path, runs)
    return {"runs": runs}


DRAWN: dict[str, tuple[str, Callable[[Study, Path], dict]]] = {
    "F1": ("coverage and rate over density in all regimes", draw_f1),
    "F2": ("coverage density, with the slopes of theory", draw_f2),
    "F3": ("area spectral efficiency, with the slopes of theory", draw_f3),
    "F4": ("phase diagram over near-field exponent and tail index", draw_f4),
    "F5": ("orderings: fading and antennas", draw_f5),
    "F6": ("the law of the SINR, from its sparse to its dense limit", draw_f6),
    "F7": ("nearest and strongest cell, with and without height", draw_f7),
    "F8": ("error against time, beside the usual ways to simulate", draw_f8),
}
