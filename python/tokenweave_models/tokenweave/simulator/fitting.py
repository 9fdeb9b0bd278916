"""Fits the constants of the built-in "h100" profile to published numbers, and says how far off the model then is.

Two constants come from the Llama latencies without communication at 8192 tokens or fewer; those of the link and the
norm come from kernel times; two that only a mixture of experts has come from Mixtral's own latencies (FIT_ROWS).
Everything else that was published is held out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import numpy as np

from tokenweave_models.tokenweave.simulator import published
from tokenweave_models.tokenweave.simulator.model_shapes import MODEL_SHAPES
from tokenweave_ops import HardwareProfile, SplitOverride, gemm_us, plan_token_split

DENSE_MODELS = ("llama-3.3-70b", "qwen2.5-72b")
MODES = ("reference", "no_communication", "weave")
# (tokens, mode) of the latencies that constants are fitted to.
FIT_ROWS = {
    "llama-3.3-70b": [(num_tokens, "no_communication") for num_tokens in (1024, 2048, 4096, 8192)],
    "mixtral-8x22b": [(1024, "weave"), (8192, "no_communication")],
}
# Fields of the profile that are neither measured nor fitted, and what else one might have assumed.
OTHER_ASSUMPTIONS = {
    **{f"low_power_share {share}": {"low_power_share": share} for share in (0.3, 0.4, 0.6, 0.7)},
    "no clock term (low_power_share 1)": {"low_power_share": 1.0},
    "without the 128x192 tiles": {"gemm_tiles": ((128, 256), (256, 128), (128, 128))},
    **{f"gemm_wave_us {us}": {"gemm_wave_us": us} for us in (0, 5)},
    **{f"gemm_operand_rows {rows}": {"gemm_operand_rows": rows} for rows in (0, 32)},
    **{f"kernel_us {us}": {"kernel_us": us} for us in (1, 5)},
    "attention 10 % slower": {"attention_tflops": 0.9 * 632},
}

FITTED = ("gemm_tflops", "pass_us", "norm_gb_s", "hbm_gb_s", "moe_gemm_efficiency", "moe_launch_us")
FITTED_LINK = ("link_gb_s", "latency_us", "cta_gb_s", "stream_gb_s")

# Pairs of what the model predicts and what was published, for some values of the constants.
Rows = list[tuple[float, float]]


def least_squares(rows_of: Callable[[list[float]], Rows], start: Sequence[float]) -> list[float]:
    """Positive constants, near ``start``, with the least squares of relative errors: Gauss-Newton on logarithms."""

    def errors(log_values: np.ndarray) -> np.ndarray:
        predicted, true = np.array(rows_of(np.exp(log_values).tolist())).T
        return np.log(predicted / true)

    best, difference = np.log(start), 1e-4
    for _ in range(100):
        here = errors(best)
        slopes = [(errors(best + difference * axis) - here) / difference for axis in np.eye(len(best))]
        step = np.linalg.lstsq(np.stack(slopes, axis=1), -here, rcond=None)[0]
        # The model has corners (waves, maxima): a full step may lead uphill.
        while np.abs(step).max() > 1e-6 and (errors(best + step) ** 2).sum() >= (here**2).sum():
            step /= 2
        best = best + step
        if np.abs(step).max() <= 1e-6:
            break
    return np.exp(best).tolist()


# ------------------------------------------------------------------------------------------------------------- the fits


def link_rows(profile: HardwareProfile) -> list[tuple[int, int, float, float]]:
    """(tokens, CTAs, predicted, published microseconds) of the fused kernel."""
    hidden_bytes, world_size = 2 * 8192, 8

    def predicted(num_tokens: int, ctas: int) -> float:
        return profile.link.collective_us(num_tokens * hidden_bytes, world_size, ctas)

    rows = [
        (num_tokens, ctas, predicted(num_tokens, ctas), us)
        for num_tokens, by_ctas in published.FUSED_US.items()
        for ctas, us in by_ctas.items()
    ]
    for num_tokens, us in published.FUSED_BEST_US.items():
        best = min((2, 4, 8, 16, 32), key=lambda ctas: predicted(num_tokens, ctas))
        rows.append((num_tokens, best, predicted(num_tokens, best), us))
    return rows


def fit_link(profile: HardwareProfile) -> HardwareProfile:
    def with_values(values: Sequence[float]) -> HardwareProfile:
        return replace(profile, link=replace(profile.link, **dict(zip(FITTED_LINK, values, strict=True))))

    def rows_of(values: Sequence[float]) -> Rows:
        return [row[2:] for row in link_rows(with_values(values))]

    return with_values(least_squares(rows_of, [300.0, 10.0, 50.0, 500.0]))


def fit_norm(profile: HardwareProfile) -> HardwareProfile:
    """Bandwidth from the slope; the offset is mostly that of timing one kernel with a cold cache, and is not used."""
    bytes_per_token = 4 * 2 * 8192

    def rows_of(values: Sequence[float]) -> Rows:
        offset_us, gb_s = values
        return [(offset_us + t * bytes_per_token / (gb_s * 1e3), us) for t, us in published.NORM_US.items()]

    _, gb_s = least_squares(rows_of, [5.0, 3000.0])
    return replace(profile, norm_gb_s=gb_s, hbm_gb_s=gb_s)


def fit_compute(profile: HardwareProfile) -> HardwareProfile:
    """The two constants fitted end to end."""

    def with_values(values: Sequence[float]) -> HardwareProfile:
        return replace(profile, gemm_tflops=values[0], pass_us=values[1])

    def rows_of(values: Sequence[float]) -> Rows:
        rows = latency_rows(with_values(values), "llama-3.3-70b", fit_only=True)
        return [(row.predicted_ms, row.published_ms) for row in rows]

    return with_values(least_squares(rows_of, [600.0, 1000.0]))


def fit_mixtral(profile: HardwareProfile) -> HardwareProfile:
    """Two constants that only a routed model has, from Mixtral's own rows: that model is no test of them.

    The rate of its grouped GEMMs from the latency without communication at 8192 tokens; the host time of a routed block
    from the weave latency at 1024, which is nearly that at 2048 and so is the host's, not the device's.
    """

    def with_values(values: Sequence[float]) -> HardwareProfile:
        return replace(profile, moe_gemm_efficiency=values[0], moe_launch_us=values[1])

    def rows_of(values: Sequence[float]) -> Rows:
        rows = latency_rows(with_values(values), "mixtral-8x22b", fit_only=True)
        return [(row.predicted_ms, row.published_ms) for row in rows]

    return with_values(least_squares(rows_of, [0.7, 600.0]))


def fit(profile: HardwareProfile) -> HardwareProfile:
    """The profile with all fitted constants replaced. The rest of it is kept: assumptions and public numbers."""
    return fit_mixtral(fit_compute(fit_norm(fit_link(profile))))


# --------------------------------------------------------------------------------------------------- what is held out


@dataclass(frozen=True)
class LatencyRow:
    model: str
    num_tokens: int
    mode: str
    predicted_ms: float
    published_ms: float
    is_fit: bool  # the constants were fitted to it; else it is held out

    @property
    def error(self) -> float:
        return self.predicted_ms / self.published_ms - 1


@dataclass(frozen=True)
class SpeedupRow:
    """Reference over weave."""

    model: str
    world_size: int
    num_tokens: int
    predicted: float
    published: float

    @property
    def error(self) -> float:
        return self.predicted - self.published


def as_published(profile: HardwareProfile, model: str, num_tokens: int, world_size: int):
    """As the authors ran it: eager, with their own splits."""
    table: dict[int, SplitOverride] = published.SPLITS[model] if world_size == 8 else published.SPLITS_4_GPUS
    return plan_token_split(num_tokens, 0, MODEL_SHAPES[model], world_size, profile, launch="eager", overrides=table)


def latency_rows(profile: HardwareProfile, model: str, *, fit_only: bool = False) -> list[LatencyRow]:
    """The model's rows on 8 GPUs."""
    rows, fit_rows = [], FIT_ROWS.get(model, [])
    for index, num_tokens in enumerate(published.TOKENS):
        modes = [mode for mode in MODES if not fit_only or (num_tokens, mode) in fit_rows]
        if not modes:
            continue
        predicted_us = as_published(profile, model, num_tokens, 8).predicted_us
        for mode in modes:
            true_ms, is_fit = published.LATENCY_MS[model][mode][index], (num_tokens, mode) in fit_rows
            rows.append(LatencyRow(model, num_tokens, mode, predicted_us[mode] / 1e3, true_ms, is_fit))
    return rows


def speedup_rows(profile: HardwareProfile, model: str) -> list[SpeedupRow]:
    """On 8 and on 4 GPUs, as far as published."""
    rows = []
    for index, num_tokens in enumerate(published.TOKENS):
        true_ms = published.LATENCY_MS[model]
        truth = {8: true_ms["reference"][index] / true_ms["weave"][index]}
        if model in published.SPEEDUP_4_GPUS:
            truth[4] = published.SPEEDUP_4_GPUS[model][index]
        for world_size, value in truth.items():
            us = as_published(profile, model, num_tokens, world_size).predicted_us
            rows.append(SpeedupRow(model, world_size, num_tokens, us["reference"] / us["weave"], value))
    return rows


def null_model_errors(rows: Sequence[SpeedupRow]) -> list[float]:
    """Errors of "the speed-up is always the same", with the constant of hindsight: the mean of these very rows."""
    constant = mean(row.published for row in rows)
    return [constant - row.published for row in rows]


@dataclass(frozen=True)
class Errors:
    """Sizes of the errors over Llama and Qwen: relative ones of latencies, those of speed-ups as they are."""

    fit: list[float]
    held_out: list[float]
    speedups_8_gpus: list[float]
    speedups_4_gpus: list[float]


def dense_errors(profile: HardwareProfile) -> Errors:
    latencies = [row for model in DENSE_MODELS for row in latency_rows(profile, model)]
    speedups = [row for model in DENSE_MODELS for row in speedup_rows(profile, model)]
    return Errors(
        *([abs(row.error) for row in latencies if row.is_fit == is_fit] for is_fit in (True, False)),
        *([abs(row.error) for row in speedups if row.world_size == world_size] for world_size in (8, 4)),
    )


@dataclass(frozen=True)
class SplitTaxRow:
    """Two GEMMs of two equal halves against those of the whole, and the predictions."""

    num_tokens: int
    unsplit_us: float
    published_unsplit_us: float
    tax: float
    published_tax: float


def split_tax_rows(profile: HardwareProfile) -> list[SplitTaxRow]:
    """The wave model alone, at the sizes of the published figure."""
    hidden, inner = published.TWO_GEMMS_HIDDEN, published.TWO_GEMMS_INNER

    def two_gemms_us(rows: int) -> float:
        activation_us = 3 * 2 * rows * inner / (profile.hbm_gb_s * 1e3)
        return gemm_us(rows, 2 * inner, hidden, profile) + activation_us + gemm_us(rows, hidden, inner, profile)

    rows = []
    for num_tokens, (unsplit_us, tax) in published.TWO_GEMMS.items():
        whole_us = two_gemms_us(num_tokens)
        rows.append(SplitTaxRow(num_tokens, whole_us, unsplit_us, 2 * two_gemms_us(num_tokens // 2) / whole_us, tax))
    return rows
