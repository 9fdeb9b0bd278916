"""The laws that ``verify`` holds against simulation, by name; each a function of a :class:`Sampling`.

Values come from closed forms and quadrature in float64, estimates from the compiled samplers. Both read the same path
loss, fading and, in the power domain, the same table of L1; the rows by geometry do not, and check that too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf, pi

import numpy as np
from scipy import special

from tokenweave_models.densification.exact import nearest, saturation, strongest
from tokenweave_models.densification.ordering import compare
from tokenweave_models.densification.runner.checks import Check, Sampling, network, per_km2

LAWS: dict[str, Callable[[Sampling], Iterable[Check]]] = {}
Law = Callable[[Sampling], Iterable[Check]]


def law(name: str) -> Callable[[Law], Law]:
    def add(function: Law) -> Law:
        LAWS[name] = function
        return function

    return add


# --------------------------------------------------------------------------------------------------- single slope

THRESHOLDS = (0.1, 0.2, 0.5, 1.0, 10.0)


@law("saturation, P(SIR > y)")
def saturation_coverage(sampling):
    for delta in (0.3, 0.5, 2 / 3, 0.8):
        one = network(f"slope:{2 / delta:.17g}")
        values = saturation.coverage(delta, THRESHOLDS)
        yield from sampling.coverages(f"delta {delta:.3g}, y {{}}", one, 1e6, THRESHOLDS, values)


@law("saturation, rate")
def saturation_rate(sampling):
    for delta, terms in ((0.3, 16), (0.5, 16), (2 / 3, 16), (0.95, 64)):  # near 1 the far field is most of it
        one = network(f"slope:{2 / delta:.17g}")
        words = f"delta {delta:.3g}" + (f", {terms} terms" if terms != 16 else "")
        yield sampling.rate(words, one, 1e6, saturation.rate(delta), num_terms=terms)


@law("saturation, E[1/SIR]")
def mean_inverse_sir(sampling):
    for delta in (0.5, 2 / 3, 0.8):
        estimate = sampling.mean_inverse_sir(network(f"slope:{2 / delta:.17g}"), 1e6)
        yield Check(f"delta {delta:.3g}", saturation.mean_inverse_sir(delta), *estimate)


@law("any fading has one law, slope 4")
def propagation_invariance(sampling):
    values = saturation.coverage(0.5, THRESHOLDS)
    for fading in ("none", "lognormal:8dB", "pareto:1.2", "nakagami:4"):
        yield from sampling.coverages(f"{fading}, y {{}}", network("slope:4", fading), 1e6, THRESHOLDS, values)
    for fading in ("none", "rayleigh"):
        one = network("slope:4", fading)
        yield from sampling.coverages(f"{fading}, by geometry, y {{}}", one, 1e6, THRESHOLDS, values, method="geometry")


@law("single slope 4 with noise W")
def single_slope_noise(sampling):
    for noise in (1.0, 30.0):
        thresholds = (1.0, 3.0, 10.0)
        values = strongest.coverage_single_slope(thresholds, 4.0, density=1.0, noise=noise)
        for method in ("power", "geometry"):
            name = f"W {noise:g}, by {method}, y {{}}"
            one = network("slope:4", "none", noise)
            yield from sampling.coverages(name, one, 1e6, thresholds, values, method=method)


# --------------------------------------------------------------------------------------- strongest cell, any path loss


@law("strongest cell, Rayleigh, any path loss")
def rayleigh_any_path_loss(sampling):
    cases = (
        ("ms:1.5@1m,4", 1.0, (1.0,), 0.0),
        ("ms:1.5@1m,4", 100.0, (1.0,), 0.0),
        ("ms:1.5@1m,4", 1.0, (3.0,), 0.5),
        ("ms:3@1m,4", 1.0, (1.0, 10.0), 0.0),
        ("ms:0.5@1m,4", 1.0, (1.0,), 0.0),
        ("ms:1@1m,3@5m,4.5", 0.3, (1.0, 4.0), 0.01),
    )
    for path_loss, density, thresholds, noise in cases:
        one = network(path_loss, noise=noise)
        (values,) = strongest.coverage_rayleigh(
            one.path_loss, one.scaled_density(per_km2(density)), thresholds, noise=one.scaled_noise()
        )
        name = f"{path_loss}, density {density:g}/m2, W {noise:g}, y {{}}"
        yield from sampling.coverages(name, one, density * 1e6, thresholds, values)


@law("strongest cell, Rayleigh, conditional sampler")
def rayleigh_conditional(sampling):
    one = network("ms:1.5@1m,4")
    (values,) = strongest.coverage_rayleigh(one.path_loss, one.scaled_density(per_km2(1.0)), (1.0, 3.0))
    yield from sampling.coverages("density 1/m2, y {}", one, 1e6, (1.0, 3.0), values, method="conditional")


@law("strongest cell at any density")
def regimes(sampling):
    """Each regime, from sparse to dense; a row of coverage at 0 dB and one of the rate."""
    cases = (
        ("ms:3@1m,4", "rayleigh"),
        ("ms:1.5@1m,4", "rayleigh"),
        ("ms:1.2@1m,4", "rayleigh"),
        ("ms:0@1m,4", "pareto:1.5"),
        ("ms:0.5@1m,4", "rayleigh"),
        ("ms:0@1m,4", "rayleigh"),
        ("ms:2@1m,4", "rayleigh"),
        ("ms:0@1m,4;rinf=100m", "pareto:0.5"),
    )
    densities = np.array([1e-2, 1.0, 1e2, 1e4, 1e6])
    for path_loss, fading in cases:
        one = network(path_loss, fading)
        found = sampling.sweep(one, per_km2(densities), [1.0], rate=True)
        for row, density in enumerate(one.scaled_density(per_km2(densities))):
            (coverage,) = strongest.coverage(one.power_measure, density, [1.0])
            rate = strongest.rate(one.power_measure, density)
            where = f"{path_loss}, {fading}, density {densities[row]:g}/m2"
            if coverage > 1e-150:  # below, neither floats nor any sampler tell it from 0
                yield Check(f"{where}, y 1", coverage, found.coverage[row, 0], found.coverage_se[row, 0])
            yield Check(f"{where}, rate", rate, found.rate_nats[row], found.rate_se[row])


@law("slow variation")
def slow_variation(sampling):
    """A flat disc with marks of P(m > x) = (ln e x)^-g: E ln(1 + m) exists for g > 1, its second moment for g > 2."""
    one = network("ms:0@1m,4;rinf=10m", "logpareto:4")
    for density in (1.0, 100.0):
        value = strongest.rate(one.power_measure, float(one.scaled_density(per_km2(density))[0]))
        yield sampling.rate(f"g 4, density {density:g}/m2, rate", one, density * 1e6, value)
    heavy = network("ms:0@1m,4;rinf=10m", "logpareto:1")
    density = float(heavy.scaled_density(per_km2(100.0))[0])
    levels = np.array([0.1, 0.5, 0.9])
    # By P(M <= x) = exp(-density L1(x)), where x is far beyond the range of floats.
    log_x = heavy.power_measure.log_power(np.log(-np.log(levels) / density))
    names = [f"g 1, density 100/m2, P(M <= its {level:.0%} quantile)" for level in levels]
    yield from sampling.shares(
        names, levels, [lambda m, _, x=x: m <= x for x in log_x], sampling.log_powers(heavy, 100e6, "power")
    )


@law("strongest power, P(M <= x)")
def maximum(sampling):
    levels = np.array([0.1, 0.5, 0.9, 0.999])
    for path_loss, fading, method, density in (
        ("ms:1.5@1m,4", "rayleigh", "geometry", 1.0),
        ("ms:1.5@1m,4", "rayleigh", "power", 1.0),
        ("ms:0@1m,4", "pareto:2.5", "geometry", 3.0),
        ("ms:3@1m,4;h=0.3m", "rayleigh*lognormal:6dB", "power", 10.0),
    ):
        one = network(path_loss, fading)
        scaled = float(one.scaled_density(per_km2(density))[0])
        log_x = one.power_measure.log_power(np.log(-np.log(levels) / scaled))
        names = [f"{path_loss}, {fading}, by {method}, quantile {level:g}" for level in levels]
        values = strongest.max_cdf(one.power_measure, scaled, np.exp(log_x))
        yield from sampling.shares(
            names, values, [lambda m, _, x=x: m <= x for x in log_x], sampling.log_powers(one, density * 1e6, method)
        )


@law("total power on slope 4, Levy law")
def levy(sampling):
    levels = np.array([0.1, 0.5, 0.9])
    for fading, method in (("none", "power"), ("rayleigh", "power"), ("rayleigh", "geometry")):
        one = network("slope:4", fading)
        root_moment = one.fading.moment(0.5)
        x = (pi**1.5 * root_moment / (2 * special.erfcinv(levels))) ** 2
        values = strongest.sum_cdf_exponent_4(x, 1.0, root_moment)
        names = [f"{fading}, by {method}, P(S <= {power:.4g})" for power in x]
        conditions = [lambda m, i, limit=limit: np.logaddexp(m, i) <= limit for limit in np.log(x)]
        yield from sampling.shares(names, values, conditions, sampling.log_powers(one, 1e6, method))


# -------------------------------------------------------------------------------------------------------- nearest cell

NEAREST_THRESHOLDS = (0.1, 0.5, 1.0, 3.0, 10.0, 100.0)


@law("nearest cell, Rayleigh, single slope")
def nearest_single_slope(sampling):
    for exponent in (2.5, 3.0, 4.0):
        one = network(f"slope:{exponent:g}", association="nearest")
        values = nearest.coverage_single_slope(NEAREST_THRESHOLDS, exponent)
        for method in ("geometry", "conditional"):
            name = f"exponent {exponent:g}, by {method}, T {{}}"
            yield from sampling.coverages(name, one, 1e6, NEAREST_THRESHOLDS, values, method=method)


@law("nearest cell, Rayleigh, rate")
def nearest_rate(sampling):
    for exponent in (3.0, 4.0):
        one = network(f"slope:{exponent:g}", association="nearest")
        yield sampling.rate(f"exponent {exponent:g}", one, 1e6, nearest.rate_single_slope(exponent))


@law("nearest cell, Rayleigh, slope 4 with noise")
def nearest_noise(sampling):
    thresholds = (0.3, 1.0, 5.0)
    for noise in (0.3, 10.0):
        one = network("slope:4", noise=noise, association="nearest")
        values = nearest.coverage_single_slope(thresholds, 4.0, density=1.0, noise=noise)
        for method in ("geometry", "conditional"):
            name = f"W {noise:g}, by {method}, T {{}}"
            yield from sampling.coverages(name, one, 1e6, thresholds, values, method=method)


@law("nearest cell, Rayleigh, slope 4 and height 0.3")
def nearest_height(sampling):
    thresholds = (0.1, 1.0, 3.0)
    one = network("slope:4;h=0.3m", association="nearest")
    for density in (0.5, 5.0):
        values = nearest.coverage_single_slope(thresholds, 4.0, density=density, height=0.3)
        for method in ("geometry", "conditional"):
            name = f"density {density:g}/m2, by {method}, T {{}}"
            yield from sampling.coverages(name, one, density * 1e6, thresholds, values, method=method)


@law("nearest cell, Rayleigh, two slopes")
def nearest_dual_slope(sampling):
    densities = np.array([0.1, 1.0, 10.0, 100.0, 1e3])
    for near in (3.0, 1.5, 0.8):
        one = network(f"ms:{near:g}@1m,4", association="nearest")
        values = nearest.coverage(one.path_loss, one.scaled_density(per_km2(densities)), [1.0])
        found = sampling.sweep(one, per_km2(densities), [1.0], method="conditional", num_points=256)
        for row, density in enumerate(densities):
            name = f"beta_0 {near:g}, density {density:g}/m2, T 1"
            yield Check(name, values[row, 0], found.coverage[row, 0], found.coverage_se[row, 0])


# -------------------------------------------------------------------------------------- scaling, orderings, asymptotes


@law("realisations the wrong way round")
def orderings(sampling):
    """Where a theorem orders two networks, no realisation may contradict it."""
    disc = "slope:4;rinf=20m"
    pairs = {
        "gamma shape 0.5 above 4": (network(disc, "gamma:0.5"), network(disc, "gamma:4")),
        "exponent 4 above 3": (network("slope:4"), network("slope:3")),
        "lognormal 8 dB above 2 dB": (network(disc, "lognormal:8dB"), network(disc, "lognormal:2dB")),
    }
    for name, (a, b) in pairs.items():
        count = min(sampling.num_realisations, 1 << 18)
        found = compare(
            a, b, [1e6], [0.0], num_realisations=count, rate=False, seed=sampling.seed, device=sampling.device
        )
        if not found.theorem:
            raise RuntimeError(f"verify: no theorem orders {name}")
        yield Check(f"{name}, of {count}", 0.0, float(found.violations.sum()), 0.0)


@law("coverage depends on density * R_1^2 only")
def scaling(sampling):
    """The same realisations in two units of length: not a bit may differ."""
    near = sampling.sweep(network("ms:1.5@1m,4"), [1e6], [1.0]).coverage[0, 0]
    far = sampling.sweep(network("ms:1.5@8m,4"), [1e6 / 64], [1.0]).coverage[0, 0]
    yield Check("R_1 1 m and 8 m", near, far, 0.0)


@law("asymptotes at 1e6 stations per R_1^2")
def asymptotes(sampling):
    """Tolerances say how slowly each is approached: rates for rho near 1 slowest."""
    cases = (
        ("ms:3@1m,4", "rayleigh", 2e-3, 1e-2),
        ("ms:1.5@1m,4", "rayleigh", 2e-2, 0.2),
        ("ms:1.2@1m,4", "rayleigh", 1e-2, 3e-2),
        ("ms:0@1m,4", "pareto:1.5", 3e-2, 8e-2),
        ("ms:0.5@1m,4", "rayleigh", 2e-2, 1e-2),
        ("ms:0@1m,4;rinf=100m", "pareto:0.5", 2e-3, 1e-2),
    )
    for path_loss, fading, of_coverage, of_rate in cases:
        one = network(path_loss, fading)
        found = sampling.sweep(one, per_km2(1e6), [1.0], rate=True)
        regime, density = one.regime(), one.scaled_density(per_km2(1e6))
        if regime.name == "saturation":
            values = saturation.coverage(regime.rho, 1.0), saturation.rate(regime.rho)
        else:
            values = strongest.deficit_coverage(regime, density, 1.0)[0], strongest.deficit_rate(regime, density)[0]
        where = f"{path_loss}, {fading}"
        yield Check(f"{where}, y 1", float(values[0]), found.coverage[0, 0], found.coverage_se[0, 0], of_coverage)
        yield Check(f"{where}, rate", float(values[1]), found.rate_nats[0], found.rate_se[0], of_rate)
    flat = network("ms:0@1m,4")
    found = sampling.sweep(flat, per_km2(1e6), rate=True)
    mean_power = flat.regime().mean_power
    value = (np.log(1e6 * pi) + np.euler_gamma) / (1e6 * mean_power)
    yield Check("ms:0@1m,4, rayleigh, rate ~ ln density / density", value, found.rate_nats[0], found.rate_se[0], 5e-3)
    slow = network("ms:0@1m,4;rinf=10m", "logpareto:1")
    found = sampling.sweep(slow, per_km2([1e2, 1e4]), [1.0, 100.0])
    for row, density in enumerate((1e2, 1e4)):
        for column, y in enumerate((1.0, 100.0)):
            name = f"slow variation, density {density:g}/m2, y {y:g}, tends to 1"
            yield Check(name, 1.0, found.coverage[row, column], found.coverage_se[row, column], 0.05)


@law("nearest cell, dense limits")
def nearest_asymptotes(sampling):
    one = network("slope:4;h=1m", association="nearest")
    found = sampling.sweep(one, per_km2([100.0, 1000.0]), method="geometry", rate=True, num_points=1024)
    limit = nearest.ase_limit_with_height(4.0, 1.0)
    for row, (density, tolerance) in enumerate(((100.0, 1e-2), (1000.0, 3e-3))):
        ase, error = density * found.rate_nats[row], density * found.rate_se[row]
        yield Check(f"height 1 m, density {density:g}/m2, ASE per m2", limit, ase, error, tolerance)
    for near, density, tolerance in ((3.0, 1e3, 1e-2), (1.5, 1e6, 1e-2)):
        one = network(f"ms:{near:g}@1m,4", association="nearest")
        found = sampling.sweep(one, per_km2(density), [1.0], method="conditional", num_points=256)
        mean_power = one.power_measure.mean_power if near < 2 else inf
        value = nearest.high_density_coverage(one.path_loss, mean_power, density, 1.0)
        estimate = found.coverage[0, 0], found.coverage_se[0, 0]
        yield Check(f"beta_0 {near:g}, density {density:g}/m2, T 1", value, *estimate, tolerance)
