"""Coverage and rate over densities and thresholds: to a number of realisations, or until errors are small enough.

One realisation serves all densities, so curves are smooth. A run can be interrupted and resumed, and spread over the
ranks of a process group; neither changes a bit of the result.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import isfinite, nan
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from tokenweave_models.densification.accumulate import Groups
from tokenweave_models.densification.exact_sweep import exact_means
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.result import Result
from tokenweave_models.densification.run import Progress, Run
from tokenweave_models.densification.samplers import MOST_DB, Settings, choose_method, make_sampler
from tokenweave_ops import __version__

MOST_REALISATIONS = 1 << 53  # float64 counts them one by one
GIVE_UP = 1 << 32  # realisations after which a target error is given up, unless the caller says otherwise
EMPTY_WARNING = 0.01  # share of realisations without any base station


def sweep(
    network: Network,
    densities_per_km2,
    thresholds_db,
    *,
    num_realisations: int | None = None,
    target_se: float | None = None,
    relative_se: bool = False,
    most_realisations: int = GIVE_UP,
    method: str = "auto",
    rate: bool = True,
    settings: Settings | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[Progress], None] = lambda progress: None,
    checkpoint: str | Path | None = None,
    group: dist.ProcessGroup | None = None,
    command: str = "",
    date: str = "",
) -> Result:
    """Samples the network, or evaluates its exact laws.

    Args:
        network: what is sampled.
        densities_per_km2: of base stations; up to 1024 positive numbers.
        thresholds_db: of SINR; up to 1024 numbers.
        num_realisations: how many; or else
        target_se: go on, doubling, until no coverage has a larger standard error (no rate, where there are no
            thresholds).
        relative_se: target_se is relative to each coverage.
        most_realisations: where a target is given up, with a warning.
        method: "power" (strongest cell, any density at the same cost), "geometry", "conditional" (Rayleigh fading,
            without rate), "exact" (formulas, no error bars), or "auto": power for the strongest cell; for the nearest
            one conditional where it can answer, else geometry.
        rate: whether the mean rate is wanted.
        settings: of the samplers.
        seed: -2^63 to 2^63 - 1. Runs that share it share their realisations, whatever their network.
        device: "cpu" or "cuda", with an index or without.
        progress: called after every call of the sampler.
        checkpoint: a .npz file. If it is there, the run goes on from it; it is written as the run goes and when it is
            interrupted by Ctrl-C.
        group: the realisations are shared among its ranks; each returns the whole result. Rank 0 has the checkpoint.
        command, date: for the result's provenance.

    Raises:
        ValueError: an argument is outside its range, or the method cannot answer.
        RuntimeError: the device is not there.
    """
    densities = _checked_densities(network, densities_per_km2)
    thresholds_db = _checked_thresholds(thresholds_db)
    method = choose_method(network, method, rate)
    _check_amount(num_realisations, target_se, most_realisations, method)
    _check_device(device)
    if not (isinstance(seed, int) and -(2**63) <= seed < 2**63):
        raise ValueError(f"sweep: seed must be an integer, -2^63 to 2^63 - 1, got {seed}")
    settings = settings or Settings()
    provenance = {
        "version": __version__,
        "method": method,
        "network": network.describe(),
        "command": command,
        "date": date,
    }
    warnings = _warnings(network, densities)
    if method == "exact":
        return _exact_result(network, densities, thresholds_db, rate, warnings, provenance)

    thresholds = 10 ** (thresholds_db / 10)
    sampler = make_sampler(
        network, method, densities, thresholds, rate=rate, settings=settings, seed=seed, device=device
    )
    identity = {
        "seed": seed,
        "method": method,
        "settings": sampler.settings,
        "network": network.describe(),
        "laws": network.fingerprint(),
        "densities_per_km2": densities.tolist(),
        "thresholds_db": thresholds_db.tolist(),
    }
    run = Run(sampler, densities, progress, checkpoint, json.dumps(identity, sort_keys=True), group)
    reached = True
    if num_realisations is not None:
        run.extend_to(num_realisations)
    else:
        reached = run.extend_until(target_se, relative_se, most_realisations)
    if not reached:
        warnings.append(f"the target error {target_se:g} was not reached with {most_realisations} realisations")
    if method == "power":
        provenance["table_error_log2"] = network.table_error(densities)
    provenance |= {
        "seed": seed,
        "num_realisations": run.accumulator.num_realisations,
        "settings": sampler.settings,
        "device": _device_name(device),
        "ranks": group.size() if group is not None else 1,
    }
    return _result(run, thresholds_db, rate, network, warnings, provenance)


def _result(run: Run, thresholds_db, rate: bool, network: Network, warnings: list[str], provenance: dict) -> Result:
    sampler, densities = run.sampler, run.densities
    mean, error = run.estimate()
    groups = run.accumulator.groups()
    moments = sampler.num_moments
    has_rate = rate and moments > 0
    unknown = np.full(len(densities), nan)
    if has_rate and not np.isfinite(mean[:, 0]).all():
        lonely = densities[~np.isfinite(mean[:, 0])]
        warnings.append(
            f"the mean rate is infinite at {lonely[0]:g}/km2{' and others' if len(lonely) > 1 else ''}: without noise, "
            "a base station that is alone has an infinite SINR"
        )
    square = run.accumulator.mean_square()[:, 2] if moments else None
    rates = groups.sums[:, :, :1] if has_rate else np.full((*groups.sums.shape[:2], 1), nan)
    return Result(
        densities_per_km2=densities,
        thresholds_db=thresholds_db,
        coverage=mean[:, moments:],
        coverage_se=error[:, moments:],
        rate_nats=mean[:, 0] if has_rate else unknown,
        rate_se=error[:, 0] if has_rate else unknown,
        truncation_bias_bound=sampler.bias_bound(square),
        histogram=run.accumulator.histogram(),
        groups=Groups(np.concatenate([rates, groups.sums[:, :, moments:]], axis=2), groups.sizes),
        regime=network.regime(),
        warnings=warnings,
        provenance=provenance,
    )


def _exact_result(
    network: Network, densities, thresholds_db, rate: bool, warnings: list[str], provenance: dict
) -> Result:
    coverage, rate_nats = exact_means(network, densities, 10 ** (thresholds_db / 10), rate)
    no_error = np.zeros(len(densities))
    return Result(
        densities_per_km2=densities,
        thresholds_db=thresholds_db,
        coverage=coverage,
        coverage_se=np.zeros_like(coverage),
        rate_nats=rate_nats,
        rate_se=no_error if rate else np.full(len(densities), nan),
        truncation_bias_bound=no_error,
        histogram=np.zeros((len(densities), 0), dtype=np.int64),
        groups=Groups(np.column_stack([rate_nats, coverage])[None], np.ones(1, dtype=np.int64)),
        regime=network.regime(),
        warnings=warnings,
        provenance=provenance,
    )


# ----------------------------------------------------------------------------------------------------- what is refused


def _checked_densities(network: Network, densities_per_km2) -> np.ndarray:
    densities = np.atleast_1d(np.asarray(densities_per_km2, dtype=np.float64))
    if densities.ndim != 1 or densities.size == 0:
        raise ValueError(f"sweep: densities_per_km2 must be a list of numbers, got shape {densities.shape}")
    network.scaled_density(densities)
    return densities


def _checked_thresholds(thresholds_db) -> np.ndarray:
    thresholds = np.atleast_1d(np.asarray(thresholds_db, dtype=np.float64))
    if thresholds.ndim != 1 or not (np.abs(thresholds) <= MOST_DB).all():
        words = f"a list of numbers from -{MOST_DB:g} to {MOST_DB:g}"
        raise ValueError(f"sweep: thresholds_db must be {words}, got {thresholds}")
    return thresholds


def _check_amount(num_realisations, target_se, most_realisations, method) -> None:
    if method == "exact":
        if num_realisations is not None or target_se is not None:
            raise ValueError("sweep: num_realisations and target_se must be left out for method exact")
        return
    if (num_realisations is None) == (target_se is None):
        raise ValueError(
            f"sweep: num_realisations or target_se must be given, not both, got {num_realisations} and {target_se}"
        )
    for name, value in (("num_realisations", num_realisations), ("most_realisations", most_realisations)):
        if value is not None and not (value == int(value) and 1 <= value <= MOST_REALISATIONS):
            raise ValueError(f"sweep: {name} must be 1 to 2^53, got {value}")
    if target_se is not None and not (target_se > 0 and isfinite(target_se)):
        raise ValueError(f"sweep: target_se must be positive, got {target_se}")


def _check_device(device: str) -> None:
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"sweep: device must be cpu or cuda, got {device}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("sweep: device cuda was asked for and there is none; the CPU is never taken in its place")


def _device_name(device: str) -> str:
    kind = torch.device(device)
    return torch.cuda.get_device_name(kind) if kind.type == "cuda" else "cpu"


def _warnings(network: Network, densities: np.ndarray) -> list[str]:
    warnings = list(network.regime().warnings)
    empty = network.empty_probability(densities)
    if (empty > EMPTY_WARNING).any():
        worst = int(empty.argmax())
        warnings.append(
            f"{empty[worst]:.1%} of realisations at {densities[worst]:g}/km2 have no base station within the radius; "
            "their SINR is 0"
        )
    return warnings
