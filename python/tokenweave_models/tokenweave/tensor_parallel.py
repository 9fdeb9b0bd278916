"""Tensor parallelism: which part of each weight a rank holds.

Heads and the inner features of the MLP are divided, as in Megatron-LM. q, k, v, gate and up keep some rows of their
weight (column-parallel: each rank makes other features); o and down keep some columns (row-parallel: each rank makes a
partial sum of all features). So one sum over the ranks ends each sublayer. Embedding and head keep some rows of the
vocabulary. Norms and the gate of a mixture of experts are whole.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenweave_models.tokenweave.config import ModelConfig
from tokenweave_models.tokenweave.model import Decoder, vocabulary_range


@dataclass(frozen=True)
class Part:
    """A rank's part of a tensor as models are published, and where in the rank's Decoder it goes.

    ``source[begin:end]`` along ``dim`` becomes ``parameter[index][offset : offset + end - begin]`` along dimension 0
    where several sources share one parameter, else the whole of it.
    """

    source: str  # a published name, `model.layers.0.self_attn.q_proj.weight`
    source_shape: tuple[int, ...]
    parameter: str  # of the Decoder
    dim: int = 0
    begin: int = 0
    end: int = 0
    index: int | None = None  # of an expert
    offset: int = 0

    def destination(self, parameter: Tensor) -> Tensor:
        place = parameter if self.index is None else parameter[self.index]
        return place[self.offset : self.offset + self.end - self.begin] if self.dim == 0 else place


def parts_of(config: ModelConfig, rank: int, world_size: int) -> Iterator[Part]:
    """Every part that a rank's Decoder is made of, by the names of Hugging Face's Llama, Qwen2 and Mixtral."""
    hidden, intermediate, head_dim = config.hidden, config.intermediate, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim

    def whole(source: str, *shape: int, parameter: str | None = None) -> Part:
        name = source.removeprefix("model.") if parameter is None else parameter
        return Part(source, shape, name, 0, 0, shape[0])

    def columns(source: str, parameter: str, shape: tuple[int, ...], offset: int = 0, index: int | None = None) -> Part:
        each = shape[0] // world_size
        return Part(source, shape, parameter, 0, rank * each, (rank + 1) * each, index, offset)

    def rows(source: str, parameter: str, shape: tuple[int, int], index: int | None = None) -> Part:
        each = shape[1] // world_size
        return Part(source, shape, parameter, 1, rank * each, (rank + 1) * each, index)

    begin, end = vocabulary_range(config.vocab_size, world_size, rank)
    vocabulary = (config.vocab_size, hidden)
    yield Part("model.embed_tokens.weight", vocabulary, "embed_tokens.weight", 0, begin, end)
    if not config.tie_embeddings:
        yield Part("lm_head.weight", vocabulary, "lm_head.weight", 0, begin, end)
    yield whole("model.norm.weight", hidden)
    for layer in range(config.num_layers):
        here = f"model.layers.{layer}"
        own = f"layers.{layer}"
        yield whole(f"{here}.input_layernorm.weight", hidden)
        yield whole(f"{here}.post_attention_layernorm.weight", hidden)
        offset = 0
        for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            source, parameter = f"{here}.self_attn.{name}_proj", f"{own}.self_attn.qkv_proj"
            yield columns(f"{source}.weight", f"{parameter}.weight", (size, hidden), offset)
            if config.qkv_bias:
                yield columns(f"{source}.bias", f"{parameter}.bias", (size,), offset)
            offset += size // world_size
        yield rows(f"{here}.self_attn.o_proj.weight", f"{own}.self_attn.o_proj.weight", (hidden, q_size))
        if config.num_experts == 0:
            for name, offset in (("gate", 0), ("up", intermediate // world_size)):
                source, parameter = f"{here}.mlp.{name}_proj.weight", f"{own}.mlp.gate_up_proj.weight"
                yield columns(source, parameter, (intermediate, hidden), offset)
            yield rows(f"{here}.mlp.down_proj.weight", f"{own}.mlp.down_proj.weight", (hidden, intermediate))
            continue
        yield whole(
            f"{here}.block_sparse_moe.gate.weight", config.num_experts, hidden, parameter=f"{own}.mlp.gate.weight"
        )  # fmt: skip
        for expert in range(config.num_experts):
            source = f"{here}.block_sparse_moe.experts.{expert}"
            for name, offset in (("w1", 0), ("w3", intermediate // world_size)):
                parameter = f"{own}.mlp.gate_up_proj"
                yield columns(f"{source}.{name}.weight", parameter, (intermediate, hidden), offset, expert)
            yield rows(f"{source}.w2.weight", f"{own}.mlp.down_proj", (hidden, intermediate), expert)


def build_decoder(
    config: ModelConfig,
    rank: int,
    world_size: int,
    read: Callable[[Part], Tensor],
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    on_part: Callable[[Part], None] = lambda part: None,
) -> Decoder:
    """A rank's Decoder from what ``read`` gives for each part: ``source[begin:end]`` along the part's dimension."""
    with torch.device("meta"):
        share = Decoder(config, rank, world_size)
    share.to(dtype).to_empty(device=device)
    parameters = dict(share.named_parameters())
    with torch.no_grad():
        for part in parts_of(config, rank, world_size):
            part.destination(parameters[part.parameter]).copy_(read(part))
            on_part(part)
    return share.requires_grad_(False)


def shard(model: Decoder, rank: int, world_size: int) -> Decoder:
    """A rank's share of a whole decoder."""
    if model.world_size != 1:
        raise ValueError(f"shard: model must be whole, got a share of {model.world_size}")
    parameters = dict(model.named_parameters())
    whole_parts = {part.source: part for part in parts_of(model.config, 0, 1)}

    def read(part: Part) -> Tensor:
        whole = whole_parts[part.source]
        return whole.destination(parameters[whole.parameter]).narrow(part.dim, part.begin, part.end - part.begin)

    weight = model.norm.weight
    return build_decoder(model.config, rank, world_size, read, weight.dtype, weight.device)
