"""A decoder from a local Hugging Face folder: its config.json as a ModelConfig, a rank's part of its weights.

What this decoder does not compute is refused by the key that asks for it, never ignored. All names and shapes are
checked before any weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tokenweave_models.common.checkpoint import LocalCheckpoint, model_folder, read_json
from tokenweave_models.common.config_keys import ConfigKeys
from tokenweave_models.common.errors import UserError
from tokenweave_models.tokenweave.config import ModelConfig, RopeScaling
from tokenweave_models.tokenweave.model import Decoder
from tokenweave_models.tokenweave.tensor_parallel import Part, build_decoder, parts_of

# By model_type, what `transformers` takes for keys that a config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 2048},
    "qwen2": {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 32768},
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 131072},
}
# What stands in a config.json for a computation that is not done here, unless it has one of these values.
INACTIVE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (),
    "partial_rotary_factor": (1,),
}
# What some checkpoints hold beyond a decoder's tensors and does no harm: rotary frequencies, which follow from the
# config, and the head of a model whose head is its embedding (that of any other is among the decoder's tensors).
TOLERATED = re.compile(r"lm_head\.weight|model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def load_config(folder: str | Path) -> ModelConfig:
    """The sizes and switches in a folder's config.json, as `transformers` 4 or 5 wrote it.

    Raises:
        UserError: no such folder or file, a key is missing or has a value of the wrong kind, or one asks for what this
            decoder does not compute.
    """
    path = model_folder(folder) / "config.json"
    keys = ConfigKeys(path, read_json(path))
    model_type = keys.values.get("model_type")
    if model_type not in list(DEFAULTS):  # a list: the value may be of any kind
        raise keys.refused("model_type", model_type, "one of " + ", ".join(DEFAULTS))
    keys.defaults = DEFAULTS[model_type]
    keys.refuse_all_but(INACTIVE)
    max_len = keys.integer("max_position_embeddings")
    _refuse_sliding_window(keys, model_type, max_len)
    rope_theta, rope_scaling = _rope(keys)
    is_mixture = model_type == "mixtral"
    num_heads = keys.integer("num_attention_heads")
    try:
        return ModelConfig(
            vocab_size=keys.integer("vocab_size"),
            hidden=keys.integer("hidden_size"),
            intermediate=keys.integer("intermediate_size"),
            num_layers=keys.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=keys.integer("num_key_value_heads", num_heads),
            head_dim=keys.integer("head_dim", 0, least=0),
            norm_eps=keys.number("rms_norm_eps"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            qkv_bias=model_type == "qwen2",
            tie_embeddings=keys.switch("tie_word_embeddings"),
            num_experts=keys.integer("num_local_experts") if is_mixture else 0,
            experts_per_token=keys.integer("num_experts_per_tok") if is_mixture else 0,
            max_len=max_len,
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def load_decoder(
    folder: str | Path,
    rank: int = 0,
    world_size: int = 1,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    on_part: Callable[[Part], None] = lambda part: None,
) -> Decoder:
    """A rank's share of the decoder in a folder. Each rank reads its own part and the few tensors that are whole.

    Args:
        dtype: of the parameters; None takes what config.json says, or else what the embedding is stored in. Weights
            stored in another dtype are converted.
        on_part: is told of each part when it was read (``parts_of`` lists them).

    Raises:
        UserError: as ``load_config`` and ``LocalCheckpoint``; tensors are missing, superfluous or of another shape; the
            model cannot be divided among world_size ranks.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"load_decoder: rank must be 0 to world_size - 1 = {world_size - 1}, got {rank}")
    config = load_config(folder)
    try:
        config.check_world_size(world_size)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    checkpoint = LocalCheckpoint(folder)
    checkpoint.check({part.source: part.source_shape for part in parts_of(config, 0, 1)}, TOLERATED)
    if dtype is None:
        dtype = checkpoint.published_dtype("model.embed_tokens.weight")

    def read(part: Part) -> torch.Tensor:
        return checkpoint.read(part.source, part.dim, part.begin, part.end)

    return build_decoder(config, rank, world_size, read, dtype, device, on_part)


def _refuse_sliding_window(keys: ConfigKeys, model_type: str, max_len: int) -> None:
    """Attention reaches over all tokens here. A window that no sequence outgrows, or that is switched off, is fine."""
    layer_types = keys.values.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise keys.refused("layer_types", layer_types, "full_attention in every layer")
    window = keys.values.get("sliding_window")
    if window is None or (type(window) is int and window >= max_len):
        return
    if model_type == "qwen2":
        first_layer = keys.integer("max_window_layers", 28, least=0)
        if not keys.switch("use_sliding_window") or first_layer >= keys.integer("num_hidden_layers"):
            return
    if model_type != "llama":  # which never had one
        raise keys.refused("sliding_window", window, f"null or at least max_position_embeddings={max_len}")


def _rope(keys: ConfigKeys) -> tuple[float, RopeScaling | None]:
    """transformers 4 writes rope_theta and rope_scaling, 5 writes both into rope_parameters."""
    section = "rope_scaling" if keys.values.get("rope_scaling") else "rope_parameters"
    values = keys.values.get(section) or {}
    if not isinstance(values, dict):
        raise keys.refused(section, values, "an object")
    if any(isinstance(value, dict) for value in values.values()):
        raise keys.refused(section, values, "the same for all layers")
    rope = ConfigKeys(keys.path, values, {"rope_theta": keys.number("rope_theta")}, f"{section}.")
    rope_theta = rope.number("rope_theta")
    if values.get("partial_rotary_factor") not in (None, 1):
        raise rope.refused("partial_rotary_factor", values["partial_rotary_factor"], "1 or absent")
    key = "rope_type" if "rope_type" in values else "type"
    rope_type = values.get(key, "default")
    if rope_type == "default":
        return rope_theta, None
    if rope_type != "llama3":
        raise rope.refused(key, rope_type, "default or llama3")
    factors = (rope.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    scaling = RopeScaling(*factors, rope.integer("original_max_position_embeddings"))
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise rope.refused("low_freq_factor", scaling.low_freq_factor, f"less than {scaling.high_freq_factor}")
    return rope_theta, scaling
