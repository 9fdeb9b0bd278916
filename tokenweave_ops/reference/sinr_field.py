"""The meaning of family sinr_field: all densities of a realisation from the same Philox bits, in float64. For reading,
not for speed.

Powers are base-2 logarithms throughout; -inf is no power. The tables and the numbers of a :class:`SinrGrid` are read as
the kernels read them (coefficients and scales of fp32): a difference to a kernel is one of arithmetic alone.
"""

from __future__ import annotations

from math import inf, log, log2, pi
from typing import NamedTuple

import torch
from torch import Tensor

from tokenweave_ops._sinr_tables import GeometryTable, LogTable, PowerTable, SinrGrid
from tokenweave_ops.reference._philox import philox4x32_10

ARRIVALS, MARKS, RESIDUAL, ACTIVITY = 0, 1, 3, 4  # streams of random words
BATCH, CELL, LANES = 16384, 256, 32


class Realisations(NamedTuple):
    """What a sampler finds in each realisation; float64."""

    log2_signal: Tensor  # [densities, realisations]
    log2_interference: Tensor  # [densities, realisations], without noise
    log2_sinr: Tensor  # [densities, realisations]
    rate: Tensor  # [densities, realisations], nats
    inverse_sinr: Tensor  # [densities, realisations]
    residual_share: Tensor  # [densities, realisations]
    coverage: Tensor  # [densities, thresholds, realisations]

    def summands(self) -> Tensor:
        """In the order of the sums that an op returns, ``[densities, 3 + thresholds, realisations]``."""
        moments = torch.stack([self.rate, self.inverse_sinr, self.residual_share], dim=1)
        return torch.cat([moments, self.coverage], dim=1)


# ------------------------------------------------------------------------------------------------------- random numbers


def random_words(stream: int, count: int, seed: int, first: int, num: int) -> Tensor:
    """The first ``count`` words of a stream, int64 ``[num, count]``, of realisations first, first + 1, ..."""
    steps = (count + 3) // 4
    counter = torch.empty(num, steps, 4, dtype=torch.int64)
    counter[..., 0] = torch.arange(steps)
    realisation = torch.arange(first, first + num)[:, None]
    counter[..., 1], counter[..., 2], counter[..., 3] = realisation, realisation >> 32, stream
    return philox4x32_10(counter.view(-1, 4), seed).view(num, -1)[:, :count]


def uniforms(words: Tensor) -> Tensor:
    return (words.double() + 0.5) * 2.0**-32


def exponentials(words: Tensor) -> Tensor:
    return -torch.log1p(-uniforms(words))


def arrival_times(count: int, seed: int, first: int, num: int) -> Tensor:
    """Of a Poisson process of rate 1, ``[num, count]``, ascending."""
    return exponentials(random_words(ARRIVALS, count, seed, first, num)).cumsum(dim=1)


def is_active(activity: float, count: int, seed: int, first: int, num: int) -> Tensor:
    """Which of the transmitters send, bool ``[num, count]``."""
    return random_words(ACTIVITY, count, seed, first, num) < activity * 2.0**32


def residual_numbers(seed: int, first: int, num: int) -> tuple[Tensor, Tensor]:
    """A standard normal deviate and a uniform number, ``[num]`` each."""
    words = random_words(RESIDUAL, 3, seed, first, num)
    radius = (2.0 * exponentials(words[:, 0])).sqrt()
    angle = pi / 2 * (2.0 * uniforms(words[:, 1]) - 1.0)
    return radius * angle.sin(), uniforms(words[:, 2])


# --------------------------------------------------------------------------------------------------------- logarithms


def log2_sum(values: Tensor) -> Tensor:
    """log2 of the sum of ``2**values`` over the last dimension."""
    return torch.logsumexp(values * log(2.0), dim=-1) / log(2.0)


def log2_noise(noise: float) -> Tensor:
    return torch.tensor(log2(noise) if noise > 0 else -inf, dtype=torch.float64)


def ratio_of(log2_signal: Tensor, log2_rest: Tensor) -> Tensor:
    """log2 SINR: -inf where there is no signal, else inf where there is nothing but the signal."""
    return torch.where(log2_signal == -inf, -inf, log2_signal - log2_rest)


def rate_of(log2_sinr: Tensor) -> Tensor:
    """ln(1 + SINR)."""
    return torch.logaddexp2(log2_sinr, torch.zeros(())) * log(2.0)


def with_residual(
    log2_sum_of_terms: Tensor, log2_mean: Tensor, log2_deviation: Tensor, normal: Tensor, residual: str
) -> tuple[Tensor, Tensor]:
    """log2 of the interference with what lies beyond the terms, and the share of its standard deviation in it."""
    if residual == "none":
        return log2_sum_of_terms, torch.zeros_like(log2_sum_of_terms)
    if residual == "mean":
        return torch.logaddexp2(log2_sum_of_terms, log2_mean), torch.zeros_like(log2_sum_of_terms)
    # Relative to the mean, so that no power under- or overflows.
    relative = (1.0 + torch.exp2(log2_deviation - log2_mean) * normal).clamp(min=0.0)
    beyond = torch.where(log2_mean == -inf, -inf, log2_mean + relative.log2())
    interference = torch.logaddexp2(log2_sum_of_terms, beyond)
    is_some = (interference > -inf) & (log2_deviation > -inf)
    return interference, torch.where(is_some, torch.exp2(log2_deviation - interference), 0.0)


# ----------------------------------------------------------------------------------------------------------- samplers


def sample_power_domain(
    table: PowerTable,
    grid: SinrGrid,
    *,
    num_realisations: int,
    first_realisation: int = 0,
    num_terms: int = 16,
    rate_nodes: int = 4,
    noise: float = 0.0,
    activity: float = 1.0,
    residual: str = "gauss",
    seed: int = 0,
) -> Realisations:
    """Received powers, strongest first: ``P_i = L1^-1(Gamma_i / density)``."""
    place = (seed, first_realisation, num_realisations)
    inverse_density, log2_density = grid.scales.double().cpu()[:, :, None].unbind(dim=1)  # [densities, 1]
    arrival = arrival_times(num_terms, *place)
    active = is_active(activity, num_terms, *place)
    normal, uniform = residual_numbers(*place)

    def power(measure: Tensor) -> Tensor:
        return torch.where(measure < table.cut, table.inverse.evaluate(measure), -inf)

    measure = arrival * inverse_density[..., None]  # [densities, realisations, terms]
    powers = power(measure)
    interferers = powers[..., 1:].masked_fill(~active[:, 1:], -inf)
    last = measure[..., -1]
    beyond = [table.inverse.evaluate(last, plane=plane) for plane in (1, 2)]
    log2_mean = torch.where(last < table.cut, beyond[0] + log2_density + log2(activity), -inf)
    log2_deviation = torch.where(last < table.cut, beyond[1] + 0.5 * (log2_density + log2(activity)), -inf)
    interference, share = with_residual(log2_sum(interferers), log2_mean, log2_deviation, normal, residual)
    rest = torch.logaddexp2(interference, log2_noise(noise))
    log2_sinr = ratio_of(powers[..., 0], rest)

    # Given the rest, the first arrival is uniform below the second.
    second = arrival[:, 1]
    limit = grid.log2_thresholds.double().cpu()[:, None] + rest[:, None, :]  # [densities, thresholds, realisations]
    log2_probability = table.measure.evaluate(limit) + log2_density[:, None] - second.log2()
    coverage = torch.exp2(log2_probability).clamp(max=1.0)

    rate = rate_of(log2_sinr)
    if rate_nodes > 0:
        node = (torch.arange(rate_nodes) + uniform[:, None]) / rate_nodes  # [realisations, nodes]
        strongest = power(node**4 * second[:, None] * inverse_density[..., None])
        rates = rate_of(ratio_of(strongest, rest[..., None]))
        rate = (4.0 * node**3 / rate_nodes * rates).sum(dim=-1)
    return Realisations(powers[..., 0], interference, log2_sinr, rate, torch.exp2(-log2_sinr), share, coverage)


def log2_gain(table: GeometryTable, squared_distance: Tensor) -> Tensor:
    """log2 of the path gain; -inf beyond the disc."""
    squared = squared_distance.clamp(min=table.min_distance**2) + table.height**2
    if isinstance(table.gain, LogTable):
        gain = table.gain.evaluate(squared)
    else:
        lines = table.gain.double().cpu()
        gain = -(lines[:, 0] + lines[:, 1] * squared.log2()[..., None]).amax(dim=-1)
    return torch.where(squared_distance < table.r_inf**2, gain, -inf)


def far_field(table: GeometryTable, last: Tensor, log2_density: Tensor) -> tuple[Tensor, Tensor]:
    """log2 of density * integral of gain, and half the log2 of density * integral of gain^2, beyond ``last``."""
    mean, deviation = (table.far.evaluate(last, plane=plane) for plane in (0, 1))
    exists = last < table.r_inf**2
    return (
        torch.where(exists, mean + log2_density, -inf),
        torch.where(exists, deviation + 0.5 * log2_density, -inf),
    )


def marks(table: GeometryTable, words: Tensor) -> Tensor:
    """log2 of the marks that random words stand for."""
    below, above = uniforms(words), uniforms(0xFFFFFFFF - words)
    low, high = table.fading.evaluate(below), table.fading.evaluate(above, plane=1)
    return torch.where(above < below, high, low)


def sample_geometry(
    table: GeometryTable,
    grid: SinrGrid,
    *,
    num_realisations: int,
    first_realisation: int = 0,
    num_points: int = 256,
    association: str = "strongest",
    noise: float = 0.0,
    activity: float = 1.0,
    residual: str = "gauss",
    seed: int = 0,
) -> Realisations:
    """Stations, nearest first: ``r_i^2 = Gamma_i / (pi density)``, each with a mark of its own."""
    place = (seed, first_realisation, num_realisations)
    inverse_density, log2_density = grid.scales.double().cpu()[:, :, None].unbind(dim=1)
    mark = marks(table, random_words(MARKS, num_points, *place))
    squared_distance = arrival_times(num_points, *place) * inverse_density[..., None] / pi
    powers = log2_gain(table, squared_distance) + mark  # [densities, realisations, points]

    serving = torch.zeros(powers.shape[:2], dtype=torch.int64)
    if association == "strongest":
        serving = powers.argmax(dim=-1)
    signal = powers.gather(-1, serving[..., None])[..., 0]
    active = is_active(activity, num_points, *place).expand(powers.shape)
    interferers = powers.masked_fill(~active, -inf).scatter(-1, serving[..., None], -inf)

    normal, _ = residual_numbers(*place)
    log2_mean, log2_deviation = far_field(table, squared_distance[..., -1], log2_density)
    if residual != "none":
        log2_mean = log2_mean + log2(activity * table.mark_mean)
    if residual == "gauss":
        log2_deviation = log2_deviation + 0.5 * log2(activity * table.mark_second_moment)
    interference, share = with_residual(log2_sum(interferers), log2_mean, log2_deviation, normal, residual)
    rest = torch.logaddexp2(interference, log2_noise(noise))
    log2_sinr = ratio_of(signal, rest)
    coverage = (log2_sinr[:, None, :] > grid.log2_thresholds.double().cpu()[:, None]).double()
    return Realisations(signal, interference, log2_sinr, rate_of(log2_sinr), torch.exp2(-log2_sinr), share, coverage)


def rayleigh_conditional(
    table: GeometryTable,
    grid: SinrGrid,
    *,
    num_realisations: int,
    first_realisation: int = 0,
    num_points: int = 64,
    association: str = "nearest",
    noise: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """The conditional coverage, float64 ``[densities, thresholds, realisations]``."""
    inverse_density, log2_density = grid.scales.double().cpu()[:, :, None].unbind(dim=1)
    arrival = arrival_times(num_points, seed, first_realisation, num_realisations)
    squared_distance = arrival * inverse_density[..., None] / pi
    gain = log2_gain(table, squared_distance)  # [densities, realisations, points]
    log2_f1, log2_f2 = far_field(table, squared_distance[..., -1], log2_density)
    total = torch.zeros(len(grid.densities), len(grid.thresholds), num_realisations, dtype=torch.float64)
    for server in range(1 if association == "nearest" else num_points):
        exists = gain[:, None, :, server] > -inf
        # The other powers times the threshold, relative to the server's, [densities, thresholds, realisations, ...].
        scale = grid.log2_thresholds.double().cpu()[:, None] - gain[:, None, :, server]
        others = torch.cat([gain[..., :server], gain[..., server + 1 :]], dim=-1)
        near = torch.log1p(torch.exp2(scale[..., None] + others[:, None])).sum(dim=-1)
        # density * s F1^2 / (F1 + s F2): right to second order in s, and never above the exact exponent.
        log2_first = scale + log2_f1[:, None]
        ratio = 2.0 * (scale + log2_f2[:, None]) - log2_first
        far = torch.where(log2_first == -inf, 0.0, torch.exp2(log2_first - torch.logaddexp2(torch.zeros(()), ratio)))
        total += torch.where(exists, torch.exp(-(torch.exp2(scale) * noise + near + far)), 0.0)
    return total.clamp(max=1.0)


# -------------------------------------------------------------------------------------------------- sums, histograms


def sums(values: Tensor) -> Tensor:
    """Sums of value and value squared as an op adds them, bit for bit: ``[..., realisations]`` to
    ``[batches, ..., 2]``, float64.

    The realisations begin at a batch. Lane j of 32 adds up numbers j, 32 + j, ... of a cell of 256, the lanes are
    added as a tree, and the cells of a batch in order. Adding the zeros that fill the last cell changes nothing.
    """
    num = values.shape[-1]
    batches = (num + BATCH - 1) // BATCH
    padded = torch.nn.functional.pad(values.double(), (0, batches * BATCH - num))
    pairs = torch.stack([padded, padded * padded])
    steps = pairs.reshape(2, *values.shape[:-1], batches, BATCH // CELL, CELL // LANES, LANES)
    lanes = torch.zeros_like(steps[..., 0, :])
    for step in range(CELL // LANES):
        lanes = lanes + steps[..., step, :]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    total = torch.zeros_like(lanes[..., 0, 0])
    for cell in range(BATCH // CELL):
        total = total + lanes[..., cell, 0]
    return total.movedim(-1, 0).movedim(1, -1)


def histogram(values: Tensor, bins: int, low: float, per_unit: float) -> Tensor:
    """int64 ``[..., bins]`` of ``[..., realisations]``; the outer bins take what lies outside."""
    place = ((values.double() - low) * per_unit).floor().clamp(0, bins - 1).to(torch.int64)
    counts = torch.zeros(*values.shape[:-1], bins, dtype=torch.int64)
    return counts.scatter_add(-1, place, torch.ones_like(place))
