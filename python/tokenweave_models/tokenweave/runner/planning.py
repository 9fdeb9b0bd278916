"""The plan of each batch: by the planner, or as the user says."""

from __future__ import annotations

from functools import lru_cache

from tokenweave_models.tokenweave.batch import Batch
from tokenweave_models.tokenweave.config import ModelConfig
from tokenweave_ops import HardwareProfile, ModelShape, SplitPlan, plan_token_split


def shape_of(config: ModelConfig, element_bytes: int) -> ModelShape:
    """What the planner has to know of a decoder."""
    return ModelShape(
        hidden=config.hidden,
        intermediate=config.intermediate,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        element_bytes=element_bytes,
    )


class Planner:
    """Equal arguments give equal plans, so all ranks have the same without asking each other.

    Args:
        split: "auto" asks the planner; "none" never splits, "half" always does, a number does so at that token of every
            batch that has more.
        launch: "eager" or "graph", how passes will be launched: what the host costs.
    """

    def __init__(
        self,
        shape: ModelShape,
        world_size: int,
        hardware: HardwareProfile,
        split: str | int = "auto",
        launch: str = "eager",
    ):
        self.shape, self.world_size, self.hardware, self.split, self.launch = shape, world_size, hardware, split, launch
        self._planned = lru_cache(maxsize=4096)(self._ask)

    def plan(self, batch: Batch) -> SplitPlan:
        if self.split == "auto":
            return self._planned(tuple(zip(batch.query_lens, batch.kv_lens, strict=True)))
        num_tokens = batch.num_tokens
        split = {"none": 0, "half": num_tokens // 2}.get(self.split, self.split)
        link = self.hardware.link
        if not 0 < split < num_tokens:
            kind = "none" if self.world_size == 1 else "fuse"
            return SplitPlan(num_tokens, kind, 0, 0, 0, link.exposed(num_tokens), self.launch, {})
        ctas = max(link.cta_choices)
        return SplitPlan(num_tokens, "split", split, ctas, ctas, link.exposed(num_tokens), self.launch, {})

    def _ask(self, requests: tuple[tuple[int, int], ...]) -> SplitPlan:
        num_tokens = sum(query_len for query_len, _ in requests)
        return plan_token_split(
            num_tokens, 0, self.shape, self.world_size, self.hardware, requests=requests, launch=self.launch
        )


def describe(kind: str, split: int) -> str:
    """A plan in a few words, for people."""
    return f"split at {split}" if kind == "split" else "no split"
