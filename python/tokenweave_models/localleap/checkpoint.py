"""Models from and to local Hugging Face folders, with the names that LLaDA and Dream give their tensors.

The names and shapes of all tensors are checked before any weight is read. Published models keep q, k and v, and gate
and up, apart; here they are rows of one parameter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenweave_models.common.checkpoint import INDEX, WEIGHTS, LocalCheckpoint
from tokenweave_models.common.errors import UserError
from tokenweave_models.localleap.config import LAYOUTS, ModelConfig, load_config
from tokenweave_models.localleap.model import DiffusionModel


@dataclass(frozen=True)
class TensorNames:
    """What a published family of models calls its tensors, without the .weight or .bias behind it.

    Attributes:
        outer: of our modules outside of the layers.
        layers: what those of layer i begin with.
        layer: of a layer's modules. The rows of several make one of ours.
        tolerated: what some checkpoints hold beyond the model's tensors and does no harm: rotary frequencies, which
            follow from the config, and the head of a model whose head is its embedding (that of any other is among the
            model's tensors).
    """

    outer: Mapping[str, str]
    layers: str
    layer: Mapping[str, tuple[str, ...]]
    tolerated: re.Pattern[str]


NAMES = {
    "llada": TensorNames(
        outer={
            "embed_tokens": "model.transformer.wte",
            "embed_positions": "model.transformer.wpe",
            "norm": "model.transformer.ln_f",
            "lm_head": "model.transformer.ff_out",
        },
        layers="model.transformer.blocks.{i}.",
        layer={
            "attn_norm": ("attn_norm",),
            "qkv_proj": ("q_proj", "k_proj", "v_proj"),
            "o_proj": ("attn_out",),
            "mlp_norm": ("ff_norm",),
            "gate_up_proj": ("ff_proj", "up_proj"),
            "down_proj": ("ff_out",),
        },
        tolerated=re.compile(r"model\.transformer\.ff_out\.weight"),
    ),
    "dream": TensorNames(
        outer={"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"},
        layers="model.layers.{i}.",
        layer={
            "attn_norm": ("input_layernorm",),
            "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "o_proj": ("self_attn.o_proj",),
            "mlp_norm": ("post_attention_layernorm",),
            "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
            "down_proj": ("mlp.down_proj",),
        },
        tolerated=re.compile(r"lm_head\.weight|model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
    ),
}


@dataclass(frozen=True)
class Part:
    """A published tensor and its place: rows begin to begin + shape[0] of one of our parameters."""

    source: str
    shape: tuple[int, ...]
    parameter: str
    begin: int


def layout_of(config: ModelConfig) -> str:
    """ "llada" or "dream": shifted models are written as Dream's, all others as LLaDA's."""
    return "dream" if config.shifted else "llada"


def parts_of(model: DiffusionModel) -> Iterator[Part]:
    """Every published tensor of the model, in the order of our parameters."""
    config, names = model.config, NAMES[layout_of(model.config)]
    kv_size = config.num_kv_heads * config.head_dim
    rows = {
        "qkv_proj": (config.num_heads * config.head_dim, kv_size, kv_size),
        "gate_up_proj": (config.intermediate,) * 2,
    }
    for parameter, tensor in model.named_parameters():
        module, kind = parameter.rsplit(".", 1)
        if module.startswith("layers."):
            _, i, module = module.split(".")
            sources = [names.layers.format(i=i) + source for source in names.layer[module]]
        else:
            sources = [names.outer[module]]
        begin = 0
        for source, size in zip(sources, rows.get(module, tensor.shape[:1]), strict=True):
            yield Part(f"{source}.{kind}", (size, *tensor.shape[1:]), parameter, begin)
            begin += size


def rows_of(parameters: Mapping[str, Tensor], part: Part) -> Tensor:
    """Where a part lies."""
    return parameters[part.parameter].narrow(0, part.begin, part.shape[0])


def load_model(
    folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> DiffusionModel:
    """The model in a folder.

    Args:
        dtype: of the parameters; None takes what config.json says, or else what the embedding is stored in. Weights
            stored in another dtype are converted.

    Raises:
        UserError: as ``load_config`` and ``LocalCheckpoint``; tensors are missing, superfluous or of another shape.
    """
    config = load_config(folder)
    with torch.device("meta"):
        model = DiffusionModel(config)
    parts = list(parts_of(model))
    checkpoint = LocalCheckpoint(folder)
    names = NAMES[layout_of(config)]
    checkpoint.check({part.source: part.shape for part in parts}, names.tolerated)
    if dtype is None:
        dtype = checkpoint.published_dtype(names.outer["embed_tokens"] + ".weight")
    model.to(dtype).to_empty(device=device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for part in parts:
            rows_of(parameters, part).copy_(checkpoint.read(part.source))
    return model


def save_model(model: DiffusionModel, folder: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes a folder that ``load_model`` reads, and the published code too: config.json and safetensors, with an index
    if there is more than one file. A shifted model is written as Dream's are, any other as LLaDA's. (Learned positions
    are not known to the published code.)

    Args:
        folder: is made if it is not there. Its config.json is written last, so that what was cut short is no model.
        max_shard_bytes: of the tensors in one file, unless one alone has more.

    Raises:
        ValueError: neither layout can express the model's config.
        UserError: the folder holds a model already, or safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise UserError("safetensors is not installed; run: pip install 'tokenweave-ops[models]'") from error
    values = config_values(model.config)
    folder = Path(folder)
    if (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: holds a model already")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder: {error.strerror}") from error
    parameters = dict(model.named_parameters())
    shards: list[list[Part]] = [[]]
    shard_bytes = 0
    for part in parts_of(model):
        part_bytes = rows_of(parameters, part).nbytes
        if shards[-1] and shard_bytes + part_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(part)
        shard_bytes += part_bytes
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {part.source: rows_of(parameters, part).detach().to("cpu", copy=True) for part in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total_bytes = sum(parameter.nbytes for parameter in parameters.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": files})
    _write_json(folder / "config.json", values)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def config_values(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, as its layout writes it."""
    layout = LAYOUTS[layout_of(config)]
    if config.head_dim * config.num_heads != config.hidden:
        raise ValueError(
            f"save_model: head_dim must be hidden / num_heads = {config.hidden / config.num_heads:g}, got "
            f"{config.head_dim}: config.json has no key for it"
        )
    if config.qkv_bias != config.shifted:
        raise ValueError(
            f"save_model: qkv_bias must be {config.shifted} as shifted is, got {config.qkv_bias}: no layout has both"
        )
    if config.learned_positions and config.shifted:
        raise ValueError(
            f"save_model: learned_positions must be 0 in a shifted model, got {config.learned_positions}: its layout "
            "has no tensor for them"
        )
    sizes = {key: getattr(config, field) for field, key in layout.keys.items()}
    if not config.learned_positions:
        sizes.pop("learned_positions", None)
    shared = {"vocab_size": config.vocab_size, "pad_token_id": config.eos_id}
    return {"model_type": layout.model_type, "architectures": [layout.architecture]} | layout.constants | sizes | shared
