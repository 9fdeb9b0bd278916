"""What a sweep found: coverage and rate over density with their errors, what follows from them, where it is from."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from math import inf, isfinite, log, nan
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from tokenweave_models.densification.accumulate import Groups, Interval, jackknife
from tokenweave_models.densification.regime import Regime
from tokenweave_ops.sinr_field import HISTOGRAM_BINS, HISTOGRAM_LOW, HISTOGRAM_PER_OCTAVE

DB_PER_OCTAVE = 10 * log(2) / log(10)
FIT_RATIO = 100.0  # slopes are fitted over the last two decades of density
# How far a slope at finite density may be from its limit and still count as agreeing: the fading of corrections that
# are powers of the density is not a disagreement.
SLOPE_TOLERANCE = 0.05
QUANTITIES = ("coverage", "rate", "coverage_density", "ase")


@dataclass(frozen=True)
class Slope:
    """A fitted exponent of density, d ln(quantity) / d ln(density), beside the predicted one.

    Attributes:
        quantity: one of :data:`QUANTITIES`.
        threshold_db: of a coverage; None of a rate.
        value, standard_error, low, high: of the fit, with its 95 % interval; nan where it is not known.
        predicted: by the regime; nan where the regime predicts no power of density.
        verdict: "agrees" within 3 standard errors or 0.05, "differs" (at these
            densities the limit may be far), "no power law" or "not measured".
    """

    quantity: str
    threshold_db: float | None
    value: float
    standard_error: float
    low: float
    high: float
    predicted: float
    verdict: str


@dataclass(frozen=True, eq=False)
class Result:
    """Of :func:`sweep`. D densities, T thresholds; all arrays float64 but the histogram.

    Attributes:
        densities_per_km2: ``[D]``.
        thresholds_db: ``[T]``.
        coverage, coverage_se: P(SINR > threshold) and its standard error, ``[D, T]``.
        rate_nats, rate_se: E ln(1 + SINR), ``[D]``, nats/s/Hz; nan where it was not asked for.
        truncation_bias_bound: ``[D]``, how far a coverage may be off because only so many base stations are taken one
            by one, to leading order in the share of the interference that is not; nan where none is known.
        histogram: int64. ``[D, 512]`` of log2 SINR, or, by the conditional method, ``[D, T, 256]`` of the coverage of a
            geometry over [0, 1]; without entries by the exact method.
        groups: sums of (rate, coverages) over groups of realisations, ``[groups, D, 1 + T]``: for intervals.
        regime: what theory says.
        warnings: sentences.
        provenance: plain values: version, seed, method, device, command, date, the network and the sampler's settings.
    """

    densities_per_km2: np.ndarray
    thresholds_db: np.ndarray
    coverage: np.ndarray
    coverage_se: np.ndarray
    rate_nats: np.ndarray
    rate_se: np.ndarray
    truncation_bias_bound: np.ndarray
    histogram: np.ndarray
    groups: Groups
    regime: Regime
    warnings: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------- what follows from it

    @property
    def coverage_density(self) -> np.ndarray:
        """Density times coverage: users in coverage per km^2, ``[D, T]``."""
        return self.densities_per_km2[:, None] * self.coverage

    @property
    def coverage_density_se(self) -> np.ndarray:
        return self.densities_per_km2[:, None] * self.coverage_se

    @property
    def ase(self) -> np.ndarray:
        """Area spectral efficiency, density times rate, ``[D]``, nats/s/Hz/km^2."""
        return self.densities_per_km2 * self.rate_nats

    @property
    def ase_se(self) -> np.ndarray:
        return self.densities_per_km2 * self.rate_se

    @property
    def rate_bits(self) -> np.ndarray:
        return self.rate_nats / log(2)

    @property
    def ase_bits(self) -> np.ndarray:
        return self.ase / log(2)

    def sinr_ccdf(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Thresholds in dB ``[511]``, the share of realisations above each and its standard error, both ``[D, 511]``:
        from the histogram, so at thresholds that were not asked for too, but without the samplers' variance reduction.

        Raises:
            ValueError: the result holds no histogram of the SINR.
        """
        if self.histogram.ndim != 2 or not self.histogram.any():
            raise ValueError(f"Result: the method {self.provenance.get('method')} leaves no histogram of the SINR")
        edges_db = (HISTOGRAM_LOW + np.arange(1, HISTOGRAM_BINS) / HISTOGRAM_PER_OCTAVE) * DB_PER_OCTAVE
        above = self.histogram[:, ::-1].cumsum(axis=1)[:, -2::-1]
        count = self.histogram.sum(axis=1, keepdims=True)
        share = above / count
        return edges_db, share, np.sqrt(share * (1 - share) / np.maximum(count - 1, 1))

    # ----------------------------------------------------------------------------------------------------- exponents

    def slopes(self) -> list[Slope]:
        """The exponents of density over its last two decades: of each coverage, of the rate, and of both times density.

        A straight line through the logarithms, by least squares; its interval by leaving out groups of realisations.
        Where a value is 0 the density is left out; with fewer than 3 densities nothing is fitted.
        """
        order = np.argsort(self.densities_per_km2, kind="stable")
        densities = self.densities_per_km2[order]
        rows = order[densities >= densities[-1] / FIT_RATIO * (1 - 1e-9)]
        found = []
        for item, threshold in enumerate([None, *self.thresholds_db.tolist()]):
            name = "rate" if threshold is None else "coverage"
            product = "ase" if threshold is None else "coverage_density"
            fit = self._fit(rows, item)
            found.append(self._slope(name, threshold, fit, 0.0))
            found.append(self._slope(product, threshold, fit, 1.0))
        return sorted(found, key=lambda slope: QUANTITIES.index(slope.quantity))

    def _fit(self, rows: np.ndarray, item: int) -> Interval | None:
        values = self.groups.means[rows, item]
        rows = rows[np.isfinite(values) & (values > 0)]
        if len(rows) < 3:
            return None
        log_density = np.log(self.densities_per_km2[rows])
        weights = log_density - log_density.mean()
        weights /= (weights**2).sum()
        with np.errstate(divide="ignore", invalid="ignore"):  # a group may hold all there is of a small coverage
            return jackknife(lambda means: weights @ np.log(means[rows, item]), self.groups)

    def _slope(self, quantity: str, threshold: float | None, fit: Interval | None, added: float) -> Slope:
        predicted = self.regime.exponents.get(quantity, nan)
        if fit is None:
            return Slope(quantity, threshold, nan, nan, nan, nan, predicted, "not measured")
        value, error = float(fit.value) + added, float(fit.standard_error)
        if not isfinite(predicted):
            verdict = "no power law"
        else:
            reach = max(SLOPE_TOLERANCE, 3 * error if isfinite(error) else 0.0)
            verdict = "agrees" if abs(value - predicted) <= reach else "differs"
        return Slope(
            quantity, threshold, value, error, float(fit.low) + added, float(fit.high) + added, predicted, verdict
        )

    # --------------------------------------------------------------------------------------------------------- files

    def save(self, path: str | Path) -> None:
        """In the format its ending names: .npz holds everything and can be loaded; .csv has a row for each density and
        threshold; .json has all means and errors, slopes, regime and provenance.

        Raises:
            ValueError: another ending.
        """
        path = Path(path)
        writers = {".npz": self._save_npz, ".csv": self._save_csv, ".json": self._save_json}
        if path.suffix not in writers:
            raise ValueError(f"Result: path must end in {', '.join(writers)}, got {path.name}")
        writers[path.suffix](path)

    def _save_npz(self, path: Path) -> None:
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        words = {"regime": asdict(self.regime), "warnings": self.warnings, "provenance": self.provenance}
        with path.open("wb") as file:
            np.savez_compressed(
                file,
                **arrays,
                group_sums=self.groups.sums,
                group_sizes=self.groups.sizes,
                words=np.array(json.dumps(words)),
            )

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Of a .npz file.

        Raises:
            ValueError: it is no such file, or was not written by :meth:`save`.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in (*_ARRAYS, "group_sums", "group_sizes")}
                words = json.loads(str(file["words"]))
        except (OSError, KeyError, ValueError, EOFError, TypeError, BadZipFile) as error:
            raise ValueError(f"Result: {Path(path).name} is not a result in .npz form: {error}") from error
        groups = Groups(arrays.pop("group_sums"), arrays.pop("group_sizes"))
        return cls(**arrays, groups=groups, **words | {"regime": Regime(**words["regime"])})

    def rows(self) -> list[dict[str, float]]:
        """One for each density and threshold, by column name."""
        nothing = [nan] * len(self.densities_per_km2)
        columns = {
            "density_per_km2": self.densities_per_km2,
            "rate_nats": self.rate_nats,
            "rate_nats_se": self.rate_se,
            "ase_nats_per_km2": self.ase,
            "ase_nats_per_km2_se": self.ase_se,
            "truncation_bias_bound": self.truncation_bias_bound,
        }
        per_threshold = {
            "coverage": self.coverage,
            "coverage_se": self.coverage_se,
            "coverage_density_per_km2": self.coverage_density,
            "coverage_density_per_km2_se": self.coverage_density_se,
        }
        thresholds: Sequence[float] = self.thresholds_db.tolist()
        return [
            {name: float(values[row]) for name, values in columns.items()}
            | ({"threshold_db": threshold} if thresholds else {})
            | {name: float(values[row, column]) for name, values in per_threshold.items() if thresholds}
            for row in range(len(nothing))
            for column, threshold in enumerate(thresholds or [nan])
        ]

    def _save_csv(self, path: Path) -> None:
        rows = self.rows()
        with path.open("w", newline="", encoding="utf-8") as file:
            for name, value in self.provenance.items():
                file.write(f"# {name}: {json.dumps(as_json(value))}\n")
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def _save_json(self, path: Path) -> None:
        arrays = {
            name: getattr(self, name).tolist() for name in (*_ARRAYS, "coverage_density", "ase") if name != "histogram"
        }
        report = {
            **arrays,
            "slopes": [asdict(slope) for slope in self.slopes()],
            "regime": asdict(self.regime),
            "warnings": self.warnings,
            "provenance": self.provenance,
        }
        path.write_text(json.dumps(as_json(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")


_ARRAYS = [part.name for part in fields(Result) if part.type == "np.ndarray"]


def as_json(value: Any) -> Any:
    """JSON has no names for what is not finite: nan becomes null, infinities become the strings "inf" and "-inf"."""
    if isinstance(value, dict):
        return {key: as_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(one) for one in value]
    if isinstance(value, float) and not isfinite(value):
        return None if value != value else ("inf" if value == inf else "-inf")
    return value
