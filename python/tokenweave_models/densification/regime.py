"""Which of the scaling regimes a dense network of strongest cells is in, and what that says of its metrics.

The tail measure of received powers, density * L1(x), varies regularly at infinity with index -rho,

    rho = min(alpha, delta_0),   delta_0 = 2 / beta_0,

alpha the tail index of the marks and beta_0 the near exponent of the path loss: large powers come either from cells
that are close or from marks that are large, whichever is likelier. The index alone decides how the SINR behaves as
the density grows:

- rho = 0, growth: the strongest power outgrows the sum of all others.
- 0 < rho < 1, saturation: SINR converges to the law of :mod:`exact.saturation`.
- rho = 1, boundary: it falls, but only logarithmically.
- rho > 1, deficit: powers have a mean, interference grows like the density and the strongest power slower.

Noise never matters in the limit. All of this is derived here; the three regimes are those of Nguyen and Kountouris,
arXiv 1611.07790.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isclose, isfinite, isinf, nan, sqrt
from typing import TYPE_CHECKING

import numpy as np

from tokenweave_models.densification.fading import Fading, LogPareto, Product
from tokenweave_models.densification.power_measure import PowerMeasure

if TYPE_CHECKING:
    from tokenweave_models.densification.path_loss import PathLoss

METRICS = ("coverage", "rate", "coverage_density", "ase")


@dataclass(frozen=True)
class Regime:
    """What theory says of a network as its density grows. Plain values only, so that it can be stored as JSON.

    Attributes:
        name: "growth", "saturation", "boundary" or "deficit".
        rho, alpha, delta_0: the index and the two it is the smaller of; inf where powers are bounded or tails light.
        kappa: of L1(x) ~ kappa x^-rho, per u^2 with powers relative to the gain at distance u; nan where no such
            constant exists (rho is 0 or inf, or a logarithm is left over) or the tail's own constant is not known.
        mean_power: integral of x dL1, the mean interference per unit of density; inf where rho <= 1.
        exponents: e of metric ~ density^e, for the metrics coverage, rate, coverage_density and ase; -inf where it
            falls faster than any power, nan where the law is no power.
        laws: the same in words, with what is known beyond the power.
        words: one or two sentences.
        moments: the moments of the marks that theory needs, by name, with their value.
        warnings: sentences; where the limits are slow, infinite or rest on a fit.
    """

    name: str
    rho: float
    alpha: float
    delta_0: float
    kappa: float
    mean_power: float
    exponents: dict[str, float]
    laws: dict[str, str]
    words: str
    moments: dict[str, float]
    warnings: list[str]


def classify(path_loss: PathLoss, fading: Fading) -> Regime:
    """The regime of the strongest cell; for the nearest cell see :func:`exact.nearest.high_density_slope`."""
    alpha, delta_0 = fading.tail_index, 2 / path_loss.near_exponent if path_loss.near_exponent else inf
    rho = min(alpha, delta_0)
    is_tied = isfinite(rho) and isclose(alpha, delta_0, rel_tol=1e-9)
    if rho == 0:
        name = "growth"
    elif isclose(rho, 1.0, rel_tol=1e-9):
        name, rho = "boundary", 1.0
    else:
        name = "saturation" if rho < 1 else "deficit"
    measure = PowerMeasure(path_loss, fading)
    kappa = nan if rho in (0, inf) or is_tied else float(measure.kappa)
    exponents, laws = _laws(name, rho, fading)
    return Regime(
        name=name,
        rho=rho,
        alpha=alpha,
        delta_0=delta_0,
        kappa=kappa,
        mean_power=inf if rho <= 1 else float(measure.mean_power),
        exponents=exponents,
        laws=laws,
        words=f"{_cause(alpha, delta_0, is_tied)}: {_MEANING[name]}",
        moments=_moments(path_loss, fading, rho),
        warnings=_warnings(name, rho, is_tied, kappa, fading),
    )


_MEANING = {
    "growth": "growth. Some marks are so large that the strongest cell outweighs all others together: SINR grows "
    "without bound.",
    "saturation": "saturation. The strongest cell and the sum of the others grow alike: SINR converges to a law that "
    "depends on rho alone.",
    "boundary": "boundary. Interference outgrows the strongest cell, but only by a logarithm of the density.",
    "deficit": "deficit. Interference grows like the density and the strongest cell slower: SINR falls to 0.",
}


def _cause(alpha: float, delta_0: float, is_tied: bool) -> str:
    index = f"rho = min(alpha {alpha:.4g}, 2 / beta_0 {delta_0:.4g}) = {min(alpha, delta_0):.4g}"
    if is_tied:
        return f"{index}, near field and tail of the fading alike"
    if isinf(min(alpha, delta_0)):
        return f"{index}, a bounded gain and a light tail"
    return f"{index}, {'the near field decides' if delta_0 < alpha else 'the tail of the fading decides'}"


def _laws(name: str, rho: float, fading: Fading) -> tuple[dict[str, float], dict[str, str]]:
    if name == "growth":
        rate = "-> inf" if fading.log_mean_exists else "infinite at every density"
        ase = "grows faster than density" if fading.log_mean_exists else "infinite at every density"
        return _by_metric(0.0, nan, 1.0, nan), _by_metric("-> 1", rate, "~ density", ase)
    if name == "saturation":
        limit = f"-> constant of rho = {rho:.4g}"
        return _by_metric(0.0, 0.0, 1.0, 1.0), _by_metric(limit, limit, "~ density", "~ density")
    if name == "boundary":
        laws = "-> 0, ~ 1 / (y ln density)", "-> 0, slower than 1 / ln density", "~ density / ln density"
        return _by_metric(nan, nan, nan, nan), _by_metric(*laws, "almost ~ density")
    if isfinite(rho):
        exponents = _by_metric(1 - rho, 1 / rho - 1, 2 - rho, 1 / rho)
        laws = {metric: f"~ density^{value:.4g}" for metric, value in exponents.items()}
        if isclose(rho, 2.0, rel_tol=1e-9):
            laws["coverage_density"] = "-> constant"
        return exponents, laws
    is_bounded, growth = _light_tail(fading)
    ends = (-1.0, -inf, 0.0) if is_bounded else (nan, -inf, nan)
    falls = "-> 0, faster than any power"
    return _by_metric(-inf, *ends), _by_metric(falls, f"~ ({growth}) / density", falls, f"~ {growth}")


def _by_metric(coverage, rate, coverage_density, ase) -> dict:
    return dict(zip(METRICS, (coverage, rate, coverage_density, ase), strict=True))


def _light_tail(fading: Fading) -> tuple[bool, str]:
    """Whether marks are bounded, and how the largest of ``density`` marks grows, which the rate follows."""
    if fading.log_max < inf:
        return True, "constant"
    near, far = 1e2, 1e3  # e of the quantiles looked at: far out, and in reach of numerical laws
    quantiles = fading.log_quantile(np.array([near, 1.2 * near, far, 1.2 * far]))
    slope_near, slope_far = (np.diff(quantiles)[[0, 2]] / np.log(1.2)).tolist()
    # P(m > x) = exp(-x^t) has slope 1/t everywhere; of a log-normal tail it grows like sigma sqrt(e / 2).
    if slope_far > 1.5 * slope_near:
        return False, f"exp({slope_far * sqrt(2 / (1.1 * far)):.2g} sqrt(2 ln density))"
    return False, "ln density" if abs(slope_far - 1) < 0.02 else f"(ln density)^{slope_far:.2g}"


def _moments(path_loss: PathLoss, fading: Fading, rho: float) -> dict[str, float]:
    """By the name of the order, those on which a statement above rests."""
    orders = {}
    if path_loss.r_inf == inf and path_loss.far_exponent < inf:
        orders[f"E[m^(2/{path_loss.far_exponent:g})], interference is finite"] = 2 / path_loss.far_exponent
    if isfinite(rho) and rho > 0 and rho < fading.tail_index:
        orders[f"E[m^{rho:.4g}], scale of the strongest power"] = rho
    if rho > 1:
        orders["E[m], mean interference"] = 1.0
    moments = {name: float(fading.moment(order)) for name, order in orders.items()}
    return moments | {"E ln(1 + m) is finite, rate exists": float(fading.log_mean_exists)}


def _warnings(name: str, rho: float, is_tied: bool, kappa: float, fading: Fading) -> list[str]:
    warnings = []
    if name == "boundary":
        warnings.append("rho = 1: limits are approached logarithmically, no finite density shows them")
    elif abs(rho - 1) < 0.35:
        warnings.append(f"rho = {rho:.4g} is close to 1: limits are approached slowly")
    if is_tied:
        warnings.append("alpha = 2 / beta_0: powers hold up to a logarithmic factor, constants are not known")
    elif isfinite(rho) and rho > 0 and not isfinite(kappa):
        warnings.append("the constant of the fading's tail is not known: exponents are predicted, constants are not")
    if not fading.log_mean_exists:
        warnings.append("E ln(1 + m) is infinite: the rate is infinite at every density, sample means say nothing")
    factors = _factors(fading)
    if fading.log_mean_exists and any(isinstance(factor, LogPareto) and factor.g <= 2 for factor in factors):
        warnings.append("the rate has no variance: its sample means and their error bars settle slowly or not at all")
    for factor in factors:
        if getattr(factor, "tail_is_fitted", False) and factor.tail_index == fading.tail_index:
            warnings.append(
                f"the tail index {factor.tail_index:.4g} is a fit to the largest marks: all predictions rest on it"
            )
    return warnings


def _factors(fading: Fading) -> list[Fading]:
    """The laws that the mark is a product of."""
    return [law for one in fading.factors for law in _factors(one)] if isinstance(fading, Product) else [fading]
