"""Tiny random checkpoints as the published models are: their keys of config.json, their names of tensors, both written
down here once more, and several safetensors files with an index."""

import json
from math import sqrt
from pathlib import Path

import torch
from safetensors.torch import save_file

# LLaDA-8B's config.json, made small. Its published sizes stand behind.
LLADA = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 48,  # 4096
    "embedding_dropout": 0.0,
    "embedding_size": 80,  # 126464
    "eos_token_id": 77,  # 126081
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 79,  # 126336
    "max_sequence_length": 64,  # 4096
    "mlp_hidden_size": 72,  # 12288
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,  # 32
    "n_kv_heads": 4,  # 32
    "n_layers": 2,  # 32
    "pad_token_id": 77,  # 126081
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 80,  # 126464
    "weight_tying": False,
}
# Dream-v0-7B's.
DREAM = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 77,  # 151643
    "eos_token_id": 77,  # 151643
    "hidden_act": "silu",
    "hidden_size": 48,  # 3584
    "initializer_range": 0.02,
    "intermediate_size": 72,  # 18944
    "mask_token_id": 79,  # 151666
    "max_position_embeddings": 64,  # 131072
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 6,  # 28
    "num_hidden_layers": 2,  # 28
    "num_key_value_heads": 2,  # 4
    "pad_token_id": 77,  # 151643
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 80,  # 152064
}


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the files of a model with this config.json hold, by name."""
    if config["model_type"] == "llada":
        hidden, inner, vocab = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
        kv_size = hidden // config["n_heads"] * config["n_kv_heads"]
        shapes = {"model.transformer.wte.weight": (vocab, hidden), "model.transformer.ln_f.weight": (hidden,)}
        if not config["weight_tying"]:
            shapes["model.transformer.ff_out.weight"] = (vocab, hidden)
        for layer in range(config["n_layers"]):
            here = f"model.transformer.blocks.{layer}"
            shapes[f"{here}.attn_norm.weight"] = shapes[f"{here}.ff_norm.weight"] = (hidden,)
            shapes[f"{here}.q_proj.weight"] = shapes[f"{here}.attn_out.weight"] = (hidden, hidden)
            shapes[f"{here}.k_proj.weight"] = shapes[f"{here}.v_proj.weight"] = (kv_size, hidden)
            shapes[f"{here}.ff_proj.weight"] = shapes[f"{here}.up_proj.weight"] = (inner, hidden)
            shapes[f"{here}.ff_out.weight"] = (hidden, inner)
        return shapes
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv_size = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        here = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{here}.{norm}.weight"] = (hidden,)
        for name, features in (("q", hidden), ("k", kv_size), ("v", kv_size)):
            shapes[f"{here}.self_attn.{name}_proj.weight"] = (features, hidden)
            shapes[f"{here}.self_attn.{name}_proj.bias"] = (features,)
        shapes[f"{here}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{here}.mlp.gate_proj.weight"] = shapes[f"{here}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{here}.mlp.down_proj.weight"] = (hidden, inner)
    return shapes


def random_tensors(config: dict, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """By name; at scales that keep a vector's size, with norms about one and biases about zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes_of(config).items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 1:
            values = 0.3 * values + (0.0 if name.endswith("bias") else 1.0)
        else:
            values = values / sqrt(shape[1])
        tensors[name] = values.to(dtype)
    return tensors


def write_checkpoint(
    folder: Path, config: dict, tensors: dict[str, torch.Tensor] | None = None, num_files: int = 3
) -> Path:
    """The folder, with config.json and the tensors (random if not given) dealt out to so many files."""
    tensors = random_tensors(config) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = [f"model-{number:05}-of-{num_files:05}.safetensors" for number in range(1, num_files + 1)]
    weight_map = {name: files[index * num_files // len(tensors)] for index, name in enumerate(tensors)}
    for file in files:
        held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
