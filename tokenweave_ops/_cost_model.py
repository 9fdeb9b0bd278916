"""What a layer of a tensor-parallel decoder costs on one rank, by the rates of a :class:`HardwareProfile`.

All times are microseconds. ``rows`` (tokens), ``sms`` and ``ctas`` may be numpy arrays that broadcast against each
other, so that every candidate split is costed at once. Nothing here asks a device: equal arguments give equal times on
all ranks. docs/planner.md derives the terms and shows their errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tokenweave_ops._hardware import HardwareProfile

if TYPE_CHECKING:
    from tokenweave_ops.token_split import ModelShape

# Operations that the host launches, per layer. A routed-experts block is counted apart (moe_launch_us).
ATTENTION_OPS = 5  # QKV projection, rotary positions, KV-cache write, attention, output projection
ATTENTION_CALL_OPS = 4  # of each further attention call: its keys and values, itself, its rows of the output
MLP_OPS = 3  # gate and up projection, activation, down projection
WEAVE_EVENTS = 8  # record-and-wait pairs between the two lanes
MOE_OPS = 7  # router, top-k, sorting, two grouped GEMMs, activation, weighted sum
MOE_SMALL_OPS = 3  # router, top-k and sorting: work in proportion to tokens, too little to see

# The clock of a device at its power limit rises while the arithmetic units idle, but not without end.
MAX_CLOCK_GAIN = 1.3


class AttentionWork(NamedTuple):
    """What the queries of a batch, or of one half of it, attend to; scalars, or one entry per candidate split."""

    queries: np.ndarray
    pairs: np.ndarray  # (query, key) pairs under the causal mask
    longest_tile: np.ndarray  # pairs of one head's largest tile of queries
    kv_tokens: np.ndarray  # keys (and values) read, over all requests


def attention_halves(requests: np.ndarray, split: np.ndarray, tile_rows: int) -> tuple[AttentionWork, AttentionWork]:
    """The work of rows [0, split) and of the rest. ``requests``: [n, 2] of (query_len, kv_len), kv_len with the new
    tokens.

    A request that straddles the split is cut: its first queries see only the keys up to themselves.
    """
    query_len, kv_len = requests.T
    begin = np.cumsum(query_len) - query_len
    first = np.clip(np.asarray(split, dtype=np.float64)[..., None] - begin, 0, query_len)
    # Kernels divide the keys of a request that fills no tile over multiprocessors: its reads bound it, not a tile. The
    # whole request counts, so that cutting it gains nothing here.
    tiled = query_len >= tile_rows

    def work(queries: np.ndarray, keys: np.ndarray) -> AttentionWork:
        keys = np.where(queries > 0, keys, 0)
        pairs = queries * keys - queries * (queries - 1) / 2
        tile = np.where(tiled, np.minimum(queries, tile_rows) * keys, 0)
        return AttentionWork(queries.sum(-1), pairs.sum(-1), tile.max(-1), keys.sum(-1))

    return work(first, kv_len - (query_len - first)), work(query_len - first, kv_len)


def attention_calls(requests: np.ndarray) -> int:
    """Of a pass that is not split: one for all requests of one new token together, one for each of the others."""
    longer = int((requests[:, 0] > 1).sum())
    return longer + (longer < len(requests))


def gemm_us(
    rows,
    features: int,
    inner: int,
    hardware: HardwareProfile,
    *,
    sms=None,
    element_bytes: int = 2,
    groups: int = 1,
    efficiency: float = 1.0,
):
    """Microseconds of ``rows`` x ``inner`` times ``inner`` x ``features``, in waves of the tile that is best for it.

    rows: a number or an array. sms: multiprocessors it may use; all of them by default.
    groups: that many matrices of ``rows`` each in one launch. Routing is uneven, so a group's last tile is half full on
        average, wherever its mean falls.
    efficiency: factor on the rate.
    """
    tile_rows, tile_features, slowdown = hardware.tile_terms
    flops_per_us = hardware.gemm_tflops * 1e6 / hardware.num_sms * efficiency
    wave_us = 2 * tile_rows * tile_features * inner / flops_per_us * slowdown + hardware.gemm_wave_us
    feature_tiles = np.ceil(features / tile_features)

    def tiles_and_reads(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        row_tiles = rows[..., None] / tile_rows
        row_tiles = np.ceil(row_tiles) if groups == 1 else groups * (row_tiles + 0.5)
        moved_bytes = element_bytes * groups * (inner * features + rows * (inner + features))
        return row_tiles * feature_tiles, moved_bytes / (hardware.hbm_gb_s * 1e3)

    def modelled_us(tiles: np.ndarray, reads_us: np.ndarray, sms: np.ndarray) -> np.ndarray:
        waves_us = np.ceil(tiles / sms[..., None]) * wave_us
        return np.maximum(waves_us.min(-1), reads_us) + hardware.kernel_us

    all_sms = np.float64(hardware.num_sms)
    rows, sms = np.asarray(rows, dtype=np.float64), all_sms if sms is None else np.asarray(sms, dtype=np.float64)
    work = tiles_and_reads(rows)
    us = modelled_us(*work, sms)
    if groups > 1 or (features, inner) not in hardware.gemm_curves:
        return us
    sampled_rows, sampled_us = hardware.gemm_curves[features, inner]
    known = np.clip(rows, sampled_rows[0], sampled_rows[-1])
    work_of_known = work if (known == rows).all() else tiles_and_reads(known)
    return np.interp(known, sampled_rows, sampled_us) * us / modelled_us(*work_of_known, all_sms)


class Block(NamedTuple):
    """Half of a layer, without its norm: what keeps the arithmetic units busy, and the rest."""

    tensor_us: np.ndarray  # GEMMs and attention
    other_us: np.ndarray  # bound by memory or launches

    @property
    def total_us(self) -> np.ndarray:
        return self.tensor_us + self.other_us


@dataclass(frozen=True)
class CostModel:
    """Costs of one model shape, divided over ``world_size`` ranks of one kind of device."""

    shape: ModelShape
    world_size: int
    hardware: HardwareProfile

    def _gemm_us(self, rows, features: int, inner: int, sms, **experts):
        return gemm_us(rows, features, inner, self.hardware, sms=sms, element_bytes=self.shape.element_bytes, **experts)

    def _stream_us(self, num_bytes):
        return num_bytes / (self.hardware.hbm_gb_s * 1e3) + self.hardware.kernel_us

    def attention_us(self, work: AttentionWork, sms):
        """Causal attention with a KV cache: all arithmetic, or that of the largest tile, or the reads, whichever takes
        longest."""
        shape, hardware = self.shape, self.hardware
        flops_per_us = hardware.attention_tflops * 1e6 / hardware.num_sms
        heads, kv_heads = shape.num_heads // self.world_size, shape.num_kv_heads // self.world_size
        flops = 4 * shape.head_dim * heads * (work.pairs + hardware.attention_extra_keys * work.queries)
        tile_flops = 4 * shape.head_dim * work.longest_tile
        read_bytes = 2 * kv_heads * shape.head_dim * shape.element_bytes * work.kv_tokens
        busy_us = np.maximum(flops / (flops_per_us * sms), tile_flops / flops_per_us)
        return np.maximum(busy_us, read_bytes / (hardware.hbm_gb_s * 1e3)) + hardware.kernel_us

    def attention_block(self, rows, work: AttentionWork, sms) -> Block:
        """QKV projection, rotary positions and KV-cache write, attention, output projection."""
        shape, world_size = self.shape, self.world_size
        q_features = shape.num_heads * shape.head_dim // world_size
        kv_features = 2 * shape.num_kv_heads // world_size * shape.head_dim
        rotary_bytes = 2 * shape.element_bytes * rows * (q_features + kv_features)
        return Block(
            tensor_us=self._gemm_us(rows, q_features + kv_features, shape.hidden, sms)
            + self.attention_us(work, sms)
            + self._gemm_us(rows, shape.hidden, q_features, sms),
            other_us=self._stream_us(rotary_bytes) + self.hardware.kernel_us,
        )

    def mlp_block(self, rows, sms) -> Block:
        """Gate and up projection, activation, down projection; with experts, those of the tokens' choice."""
        shape = self.shape
        inner = shape.intermediate // self.world_size
        if not shape.num_experts:
            return Block(
                tensor_us=self._gemm_us(rows, 2 * inner, shape.hidden, sms)
                + self._gemm_us(rows, shape.hidden, inner, sms),
                other_us=self._stream_us(3 * shape.element_bytes * rows * inner),
            )
        routed = np.asarray(rows, dtype=np.float64) * shape.experts_per_token
        experts = {"groups": shape.num_experts, "efficiency": self.hardware.moe_gemm_efficiency}
        return Block(
            tensor_us=self._gemm_us(routed / shape.num_experts, 2 * inner, shape.hidden, sms, **experts)
            + self._gemm_us(routed / shape.num_experts, shape.hidden, inner, sms, **experts),
            other_us=self._stream_us(3 * shape.element_bytes * routed * inner)
            + self._stream_us(shape.element_bytes * (routed + rows) * shape.hidden)
            + MOE_SMALL_OPS * self.hardware.kernel_us,
        )

    def norm_us(self, rows):
        """Residual add and norm of whole rows: reads two tensors, writes two."""
        moved_bytes = 4 * self.shape.element_bytes * rows * self.shape.hidden
        return moved_bytes / (self.hardware.norm_gb_s * 1e3) + self.hardware.kernel_us

    def collective_us(self, rows, ctas):
        """All-reduce of [rows, hidden], with or without residual add and norm between its two halves."""
        if self.world_size == 1:
            return np.zeros_like(rows)
        num_bytes = self.shape.element_bytes * rows * self.shape.hidden
        return self.hardware.link.collective_us(num_bytes, self.world_size, ctas)

    def at_power_limit_us(self, tensor_us: float, other_us: float) -> float:
        """Time of a pass with so much tensor and other work, on a device whose power limit sets its clock.

        Tensor work at the sustained clock draws all of the power; other work leaves a share of its own time's energy,
        with which the clock rises. Power grows with the cube of the clock f, so a pass that takes x = tensor_us / f for
        its tensor work has f^3 x = x + spare, which is x^3 + spare x^2 = tensor_us^3.
        """
        spare_us = other_us * (1 - self.hardware.low_power_share)
        x = tensor_us
        for _ in range(8):  # Newton from above: the cubic is convex there
            x -= (x * x * (x + spare_us) - tensor_us**3) / (3 * x * x + 2 * spare_us * x)
        return max(x, tensor_us / MAX_CLOCK_GAIN) + other_us

    def ends_us(self) -> float:
        """What is outside the layers, collectives apart: a fixed cost, and reading the head once."""
        head_bytes = self.shape.element_bytes * self.shape.vocab_size * self.shape.hidden / self.world_size
        return self.hardware.pass_us + self._stream_us(head_bytes)

    def host_us(self, mode: str, launch: str, calls: int) -> float:
        """Time the host needs to launch a whole pass; a pass is never faster than this.

        calls: of attention, per layer of a pass that is not split. The split cuts one of them in two.
        """
        hardware, routed = self.hardware, bool(self.shape.num_experts)
        halves = 2 if mode == "weave" else 1
        norms = {"reference": 4, "no_communication": 2, "fused": 2, "weave": 4 + WEAVE_EVENTS}[mode]
        ops = halves * (ATTENTION_OPS + (0 if routed else MLP_OPS)) + norms + (calls - 1) * ATTENTION_CALL_OPS
        if launch == "eager":
            layer_us = ops * hardware.eager_launch_us + halves * routed * hardware.moe_launch_us
        else:
            layer_us = (ops + halves * routed * MOE_OPS) * hardware.graph_launch_us
        return self.shape.num_layers * layer_us


def overlap_us(compute_free_us, compute_beside_us, collective_us):
    """Time of a pair: compute takes ``compute_beside_us`` on the multiprocessors a collective leaves it, and
    ``compute_free_us`` on all of them, which it gets back when the collective has ended."""
    done = np.minimum(collective_us / compute_beside_us, 1.0)
    return np.maximum(collective_us + (1 - done) * compute_free_us, collective_us)


class WeaveTimes(NamedTuple):
    """One layer of two overlapping halves, and the collectives at both ends of a pass.

    Beside a block of half h runs a collective over the rows of the other half: the one before the block for h = 0, the
    one after it for h = 1. Shapes: [half, CTA choice, split].
    """

    attention: Block  # on all multiprocessors (one CTA choice) ...
    attention_beside_us: np.ndarray  # ... and on those that the collective leaves
    attention_collective_us: np.ndarray
    mlp: Block
    mlp_beside_us: np.ndarray
    mlp_collective_us: np.ndarray
    exposed_us: np.ndarray  # half 0 before the first layer, half 1 after the last: nothing hides them


def weave_times(
    cost: CostModel,
    requests: np.ndarray,
    num_tokens: int,
    split: Sequence[int] | np.ndarray,
    attention_ctas: Sequence[int],
    mlp_ctas: Sequence[int],
) -> WeaveTimes:
    hardware, link = cost.hardware, cost.hardware.link
    split = np.asarray(split, dtype=np.float64)
    rows = np.stack((split, num_tokens - split))[:, None]
    works = attention_halves(requests, split, hardware.attention_tile_rows)
    work = AttentionWork(*(np.stack(pair)[:, None] for pair in zip(*works, strict=True)))

    def multiprocessors(ctas: Sequence[int]) -> np.ndarray:
        taken = np.array([0, *ctas]) * link.sms_per_cta
        return np.maximum(hardware.num_sms - taken, 1.0)[:, None]

    def beside_us(block: Block, ctas: Sequence[int]) -> np.ndarray:
        """A collective that takes all multiprocessors, as one between CPU ranks of one core, stops compute."""
        takes_all = np.array(ctas) * link.sms_per_cta >= hardware.num_sms
        return np.where(takes_all[:, None], np.inf, block.total_us[:, 1:])

    attention = cost.attention_block(rows, work, multiprocessors(attention_ctas))
    mlp = cost.mlp_block(rows, multiprocessors(mlp_ctas))
    return WeaveTimes(
        attention=Block(attention.tensor_us[:, :1], attention.other_us),
        attention_beside_us=beside_us(attention, attention_ctas),
        attention_collective_us=cost.collective_us(rows[::-1], np.array(attention_ctas)[:, None]),
        mlp=Block(mlp.tensor_us[:, :1], mlp.other_us),
        mlp_beside_us=beside_us(mlp, mlp_ctas),
        mlp_collective_us=cost.collective_us(rows[::-1], np.array(mlp_ctas)[:, None]),
        exposed_us=cost.collective_us(rows, link.exposed(num_tokens)),
    )
