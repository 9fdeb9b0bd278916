"""What a masked diffusion language model is made of: LLaDA's transformer, and Dream's, which is Qwen 2.5's body.

Also how either says so in its config.json. What is not computed here is refused by the key that asks for it, never
ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenweave_models.common.checkpoint import model_folder, read_json
from tokenweave_models.common.config_keys import ConfigKeys
from tokenweave_models.common.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a bidirectional transformer: pre-norm blocks of attention and SwiGLU, rotary positions.

    Attributes:
        hidden: of the residual stream.
        intermediate: inner features of the MLP.
        num_kv_heads: keys and values are shared by groups of num_heads / num_kv_heads heads.
        head_dim: even; RoPE pairs element i with element i + head_dim / 2.
        vocab_size: rows of embedding and head. A tokenizer may have fewer tokens.
        norm_eps: added to the mean square by every RMSNorm.
        qkv_bias: the projections to queries, keys and values have a bias (Dream). All others never do.
        shifted: the logits of row p - 1 predict the token at position p, as in the autoregressive model that Dream was
            made from, and those of row 0 also the token at position 0. Otherwise row p predicts position p.
        mask_id: the token that stands at positions not yet decided.
        eos_id: the token that ends a text.
        max_positions: a sequence has at most so many, padding included.
        tie_embeddings: the head is the embedding.
        learned_positions: if not 0, a learned vector for each of so many positions is added to the embedding, beside
            RoPE. For small models that one trains; no published model has them.
    """

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    qkv_bias: bool
    shifted: bool
    mask_id: int
    eos_id: int
    max_positions: int
    tie_embeddings: bool = False
    learned_positions: int = 0

    def __post_init__(self) -> None:
        sizes = ("hidden", "num_layers", "num_heads", "num_kv_heads", "intermediate", "vocab_size", "max_positions")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig: {name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"ModelConfig: head_dim must be even (rotary pairs), got {self.head_dim}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig: num_heads must be a multiple of num_kv_heads, got num_heads={self.num_heads}, "
                f"num_kv_heads={self.num_kv_heads}"
            )
        for name in ("mask_id", "eos_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"ModelConfig: {name} must be 0 to vocab_size - 1 = {self.vocab_size - 1}, got "
                    f"{getattr(self, name)}"
                )
        if self.mask_id == self.eos_id:  # padding is filled with eos_id, and must not be decoded
            raise ValueError(f"ModelConfig: mask_id and eos_id must differ, got {self.mask_id} for both")
        if self.learned_positions and self.learned_positions < self.max_positions:
            raise ValueError(
                f"ModelConfig: learned_positions must be 0 or at least max_positions={self.max_positions}, got "
                f"{self.learned_positions}"
            )


# Base, Instruct and 1.5 share it.
LLADA_8B = ModelConfig(
    hidden=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate=12288,
    vocab_size=126464,
    norm_eps=1e-5,
    rope_theta=5e5,
    qkv_bias=False,
    shifted=False,
    mask_id=126336,
    eos_id=126081,
    max_positions=4096,
)

# Dream-v0 Base and Instruct. It was trained on texts of up to 2048 tokens.
DREAM_7B = ModelConfig(
    hidden=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    intermediate=18944,
    vocab_size=152064,
    norm_eps=1e-6,
    rope_theta=1e6,
    qkv_bias=True,
    shifted=True,
    mask_id=151666,
    eos_id=151643,
    max_positions=131072,
)


# ---------------------------------------------------------------------------------------------------------- config.json


@dataclass(frozen=True)
class ConfigLayout:
    """How a published family of models writes its config.json.

    Attributes:
        model_type, architecture: as they stand there.
        keys: the key of each field of ModelConfig that has one.
        constants: what else the published models say that decides what is computed; they must say so, or nothing.
        required: those of the constants that may not be absent, since the published code then computes something else.
        refused: keys that may not be there at all.
        defaults: of keys that are absent, by the published code; of tokens, those of the published models.
    """

    model_type: str
    architecture: str
    keys: Mapping[str, str]
    constants: Mapping[str, Any]
    required: tuple[str, ...]
    refused: tuple[str, ...]
    defaults: Mapping[str, Any]


LLADA = ConfigLayout(
    model_type="llada",
    architecture="LLaDAModelLM",
    keys={
        "hidden": "d_model",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "num_kv_heads": "n_kv_heads",
        "intermediate": "mlp_hidden_size",
        "vocab_size": "embedding_size",
        "norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "mask_id": "mask_token_id",
        "eos_id": "eos_token_id",
        "max_positions": "max_sequence_length",
        "tie_embeddings": "weight_tying",
        "learned_positions": "learned_positions",  # not published: see ModelConfig
    },
    constants={
        "activation_type": "silu",
        "alibi": False,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "rope": True,
        "rope_full_precision": True,
        "scale_logits": False,
    },
    required=("activation_type", "block_type", "layer_norm_type", "rope"),
    refused=("multi_query_attention", "quantization_config", "rope_parameters", "rope_scaling"),
    defaults={
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "max_sequence_length": 1024,
        "weight_tying": True,
        "mask_token_id": LLADA_8B.mask_id,
        "pad_token_id": LLADA_8B.eos_id,
    },
)

DREAM = ConfigLayout(
    model_type="Dream",
    architecture="DreamModel",
    keys={
        "hidden": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "intermediate": "intermediate_size",
        "vocab_size": "vocab_size",
        "norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "mask_id": "mask_token_id",
        "eos_id": "eos_token_id",
        "max_positions": "max_position_embeddings",
        "tie_embeddings": "tie_word_embeddings",
    },
    constants={
        "attention_bias": True,  # of q, k and v; the published code never asks
        "hidden_act": "silu",
        "mlp_bias": False,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    required=(),
    # block_size: models of the same name that attend block by block and are not shifted
    refused=("block_size", "quantization_config", "rope_parameters", "rope_scaling"),
    defaults={
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "max_position_embeddings": 32768,
        "mask_token_id": DREAM_7B.mask_id,
        "pad_token_id": DREAM_7B.eos_id,
    },
)

LAYOUTS = {"llada": LLADA, "dream": DREAM}


def load_config(folder: str | Path) -> ModelConfig:
    """The sizes and switches in a folder's config.json, of model_type ``llada`` or ``dream``, in any case of letters.

    Keys that are absent have the value that the published code gives them (n_kv_heads: n_heads; mlp_hidden_size: 4
    d_model), but the tokens are those of the published models: mask_token_id 126336 for LLaDA and 151666 for Dream,
    eos_token_id what pad_token_id says, or else 126081 and 151643.

    Raises:
        UserError: no such folder or file, a key is missing or has a value of the wrong kind, or one asks for what this
            model does not compute.
    """
    path = model_folder(folder) / "config.json"
    keys = ConfigKeys(path, read_json(path))
    model_type = keys.values.get("model_type")
    layout = LAYOUTS.get(model_type.lower()) if isinstance(model_type, str) else None
    if layout is None:
        raise keys.refused("model_type", model_type, "one of " + ", ".join(LAYOUTS))
    for key in layout.required:
        if (value := keys.values.get(key)) != layout.constants[key]:
            raise keys.refused(key, value, repr(layout.constants[key]))
    keys.refuse_all_but({key: (value,) for key, value in layout.constants.items()} | dict.fromkeys(layout.refused, ()))
    keys.defaults = layout.defaults
    key_of = layout.keys
    hidden, num_heads = keys.integer(key_of["hidden"]), keys.integer(key_of["num_heads"])
    if hidden % num_heads:
        raise keys.refused(key_of["num_heads"], num_heads, f"a divisor of {key_of['hidden']}={hidden}")
    is_llada = layout is LLADA
    inner = keys.integer("mlp_ratio", 4) * hidden if is_llada else None
    pad_id = keys.integer("pad_token_id", least=0)
    try:
        return ModelConfig(
            hidden=hidden,
            num_layers=keys.integer(key_of["num_layers"]),
            num_heads=num_heads,
            num_kv_heads=keys.integer(key_of["num_kv_heads"], num_heads),
            head_dim=hidden // num_heads,
            intermediate=keys.integer(key_of["intermediate"], inner),
            vocab_size=keys.integer(key_of["vocab_size"], keys.values.get("vocab_size")),
            norm_eps=keys.number(key_of["norm_eps"]),
            rope_theta=keys.number(key_of["rope_theta"]),
            qkv_bias=not is_llada,
            shifted=not is_llada,
            mask_id=keys.integer(key_of["mask_id"], least=0),
            eos_id=keys.integer(key_of["eos_id"], pad_id, least=0),
            max_positions=keys.integer(key_of["max_positions"]),
            tie_embeddings=keys.switch(key_of["tie_embeddings"]),
            learned_positions=keys.integer(key_of["learned_positions"], 0, least=0) if is_llada else 0,
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
