"""A decoder from a folder: each rank reads its parts only, and tensors that do not fit are refused before that.

The names and shapes of tensors are written down here once more, as the published checkpoints have them.
"""

import json
import math

import pytest
import torch

safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed: no checkpoint can be read")

from safetensors.torch import load_file, save_file  # noqa: E402
from tokenweave_models.common.checkpoint import LocalCheckpoint  # noqa: E402
from tokenweave_models.common.errors import UserError  # noqa: E402
from tokenweave_models.tokenweave import checkpoint  # noqa: E402
from tokenweave_models.tokenweave.checkpoint import load_config, load_decoder  # noqa: E402
from tokenweave_models.tokenweave.tensor_parallel import parts_of  # noqa: E402

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS, EXPERTS = 24, 40, 8, 4, 6, 67, 2, 3

LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}
QWEN2 = LLAMA | {"model_type": "qwen2"}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
MODELS = {"llama": LLAMA, "qwen2": QWEN2, "mixtral": MIXTRAL, "tied": LLAMA | {"tie_word_embeddings": True}}


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        here = f"model.layers.{layer}."
        shapes[here + "input_layernorm.weight"] = shapes[here + "post_attention_layernorm.weight"] = (HIDDEN,)
        for name, features in (("q", HEADS * HEAD_DIM), ("k", KV_HEADS * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM)):
            shapes[f"{here}self_attn.{name}_proj.weight"] = (features, HIDDEN)
            if config["model_type"] == "qwen2":
                shapes[f"{here}self_attn.{name}_proj.bias"] = (features,)
        shapes[here + "self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        if config["model_type"] != "mixtral":
            shapes[here + "mlp.gate_proj.weight"] = shapes[here + "mlp.up_proj.weight"] = (INNER, HIDDEN)
            shapes[here + "mlp.down_proj.weight"] = (HIDDEN, INNER)
            continue
        shapes[here + "block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for name, shape in (("w1", (INNER, HIDDEN)), ("w2", (HIDDEN, INNER)), ("w3", (INNER, HIDDEN))):
                shapes[f"{here}block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    return shapes


def write(folder, config: dict, tensors: dict[str, torch.Tensor]):
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def random_tensors(config: dict, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes_of(config).items()}


@pytest.fixture(params=MODELS)
def config(request) -> dict:
    return MODELS[request.param]


@pytest.fixture
def folder(tmp_path, config):
    return write(tmp_path, config, random_tensors(config))


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_parts_concatenate_to_the_whole(folder, config, world_size):
    ranks = [load_decoder(folder, rank, world_size) for rank in range(world_size)]
    stored = load_file(folder / "model.safetensors")

    def joined(tensors, dim):
        return torch.cat(list(tensors), dim=dim)

    def columns(parameters, sizes):
        """What lies one below the other in each rank's parameter, each joined over the ranks."""
        parts = [parameter.split([size // world_size for size in sizes], dim=-2 if parameter.ndim > 1 else 0)
                 for parameter in parameters]  # fmt: skip
        return [joined(part, dim=-2 if part[0].ndim > 1 else 0) for part in zip(*parts, strict=True)]

    rebuilt = {
        "model.embed_tokens.weight": joined((rank.embed_tokens.weight for rank in ranks), 0),
        "model.norm.weight": ranks[-1].norm.weight,
    }
    if not config.get("tie_word_embeddings"):
        rebuilt["lm_head.weight"] = joined((rank.lm_head.weight for rank in ranks), 0)
    for layer in range(LAYERS):
        here, layers = f"model.layers.{layer}.", [rank.layers[layer] for rank in ranks]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            rebuilt[f"{here}{norm}.weight"] = getattr(layers[-1], norm).weight
        for kind in ("weight", "bias") if config["model_type"] == "qwen2" else ("weight",):
            sizes = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
            qkv = columns([getattr(own.self_attn.qkv_proj, kind) for own in layers], sizes)
            for name, tensor in zip("qkv", qkv, strict=True):
                rebuilt[f"{here}self_attn.{name}_proj.{kind}"] = tensor
        rebuilt[here + "self_attn.o_proj.weight"] = joined((own.self_attn.o_proj.weight for own in layers), 1)
        if config["model_type"] == "mixtral":
            gate, up = columns([own.mlp.gate_up_proj for own in layers], (INNER, INNER))
            down = joined((own.mlp.down_proj for own in layers), 2)
            rebuilt[here + "block_sparse_moe.gate.weight"] = layers[-1].mlp.gate.weight
            for expert in range(EXPERTS):
                for name, tensor in (("w1", gate), ("w3", up), ("w2", down)):
                    rebuilt[f"{here}block_sparse_moe.experts.{expert}.{name}.weight"] = tensor[expert]
        else:
            gate, up = columns([own.mlp.gate_up_proj.weight for own in layers], (INNER, INNER))
            down = joined((own.mlp.down_proj.weight for own in layers), 1)
            for name, tensor in (("gate", gate), ("up", up), ("down", down)):
                rebuilt[f"{here}mlp.{name}_proj.weight"] = tensor
    assert rebuilt.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(rebuilt[name], tensor), name
    for rank in ranks:
        assert not any(parameter.requires_grad or parameter.is_meta for parameter in rank.parameters())


@pytest.fixture
def opened(monkeypatch) -> list[LocalCheckpoint]:
    """Every checkpoint that the loader opens."""
    checkpoints = []

    class Noted(LocalCheckpoint):
        def __init__(self, folder):
            super().__init__(folder)
            checkpoints.append(self)

    monkeypatch.setattr(checkpoint, "LocalCheckpoint", Noted)
    return checkpoints


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_rank_reads_its_part_and_what_is_whole(folder, config, world_size, opened):
    for rank in range(world_size):
        load_decoder(folder, rank, world_size)
    all_bytes = {name: 4 * math.prod(shape) for name, shape in shapes_of(config).items()}
    whole_bytes = sum(size for name, size in all_bytes.items() if "norm" in name or "moe.gate" in name)
    divided_bytes = sum(all_bytes.values()) - whole_bytes
    assert sum(rank.bytes_read for rank in opened) == divided_bytes + world_size * whole_bytes
    # The vocabulary is no multiple: the first ranks have a row more of embedding and head.
    assert max(rank.bytes_read for rank in opened) <= divided_bytes / world_size + whole_bytes + 2 * 4 * HIDDEN


def test_a_part_is_told_when_it_was_read(folder, config, opened):
    seen = []
    load_decoder(folder, 1, 2, on_part=lambda part: seen.append((part, opened[0].bytes_read)))
    assert [part for part, _ in seen] == list(parts_of(load_config(folder), 1, 2))
    assert {part.source for part, _ in seen} == shapes_of(config).keys()
    assert [count for _, count in seen] == sorted(count for _, count in seen)
    assert 0 < seen[0][1] < seen[-1][1] == opened[0].bytes_read


@pytest.mark.parametrize("stored, published, asked, expected", [
    (torch.bfloat16, {"torch_dtype": "bfloat16"}, None, torch.bfloat16),
    (torch.float32, {"torch_dtype": "bfloat16"}, None, torch.bfloat16),
    (torch.bfloat16, {"dtype": "float32"}, None, torch.float32),
    (torch.float16, {}, None, torch.float16),
    (torch.float16, {"torch_dtype": "float16"}, torch.float32, torch.float32),
])  # fmt: skip
def test_weights_are_converted(tmp_path, stored, published, asked, expected):
    config = {key: value for key, value in LLAMA.items() if key != "torch_dtype"} | published
    tensors = random_tensors(config, stored)
    model = load_decoder(write(tmp_path, config, tensors), dtype=asked)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"].to(expected))


def test_an_unknown_dtype_is_refused(tmp_path):
    config = LLAMA | {"torch_dtype": "float8_e4m3fn"}
    write(tmp_path, config, random_tensors(LLAMA))
    with pytest.raises(UserError, match="torch_dtype must be one of float32, float16, bfloat16, got 'float8_e4m3fn'$"):
        load_decoder(tmp_path)


# --------------------------------------------------------------------------------------------------- strict about keys


def load_error(tmp_path, config, tensors, opened) -> str:
    """The refusal of these tensors, which comes before anything was read."""
    with pytest.raises(UserError) as raised:
        load_decoder(write(tmp_path, config, tensors))
    assert opened[0].bytes_read == 0
    message = str(raised.value)
    start = f"{tmp_path}: the tensors do not fit its config.json. "
    assert message.startswith(start)
    return message.removeprefix(start)


def test_missing_tensors(tmp_path, opened):
    tensors = random_tensors(LLAMA)
    for name in [name for name in tensors if "layers.1.mlp" in name or "lm_head" in name]:
        del tensors[name]
    assert load_error(tmp_path, LLAMA, tensors, opened) == (
        "4 missing: lm_head.weight, model.layers.1.mlp.gate_proj.weight, model.layers.1.mlp.up_proj.weight and 1 more"
    )


def test_superfluous_tensors(tmp_path, opened):
    tensors = random_tensors(QWEN2)
    assert load_error(tmp_path, LLAMA, tensors, opened).startswith(
        "6 superfluous: model.layers.0.self_attn.k_proj.bias,"
    )


def test_tensors_of_another_shape(tmp_path, opened):
    tensors = random_tensors(LLAMA)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].T.contiguous()
    assert load_error(tmp_path, LLAMA, tensors, opened) == (
        "2 of another shape: lm_head.weight is [66, 24] instead of [67, 24], "
        "model.layers.0.mlp.down_proj.weight is [40, 24] instead of [24, 40]"
    )


def test_tensors_of_another_kind(tmp_path, opened):
    tensors = random_tensors(LLAMA)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    assert load_error(tmp_path, LLAMA, tensors, opened) == (
        "1 of a dtype other than F64, F32, F16, BF16: model.norm.weight is I8"
    )


def test_all_that_is_wrong_is_told_at_once(tmp_path, opened):
    tensors = random_tensors(LLAMA)
    tensors["model.norm.bias"] = tensors["model.norm.weight"].clone()
    tensors["model.norm.weight"] = torch.ones(HIDDEN + 1)
    del tensors["lm_head.weight"]
    assert load_error(tmp_path, LLAMA, tensors, opened) == (
        "1 missing: lm_head.weight. 1 superfluous: model.norm.bias. "
        "1 of another shape: model.norm.weight is [25] instead of [24]"
    )


def test_harmless_tensors_are_left_alone(tmp_path):
    tied = MODELS["tied"]
    tensors = random_tensors(tied)
    extra = {
        "lm_head.weight": torch.full((VOCAB, HIDDEN), torch.nan),
        "model.rotary_emb.inv_freq": torch.ones(3),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(3),
    }
    model = load_decoder(write(tmp_path, tied, tensors | extra))
    assert torch.equal(model.embed_tokens.weight, tensors["model.embed_tokens.weight"])
    assert not hasattr(model, "lm_head")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.inv_freq", "lm_head.weight_scale", "lm_head.bias"])
def test_what_only_looks_harmless_is_superfluous(tmp_path, name, opened):
    tensors = random_tensors(LLAMA) | {name: torch.ones(3)}
    assert load_error(tmp_path, LLAMA, tensors, opened) == f"1 superfluous: {name}"


@pytest.mark.parametrize(
    "world_size, message",
    [
        (3, "num_heads must be a multiple of world_size, got num_heads=8, world_size=3"),
        (8, "num_kv_heads must be a multiple of world_size, got num_kv_heads=4, world_size=8"),
    ],
)
def test_a_world_size_that_does_not_divide(folder, world_size, message, opened):
    with pytest.raises(UserError) as raised:
        load_decoder(folder, 0, world_size)
    assert str(raised.value) == f"{folder}: ModelConfig: {message}"
    assert not opened


def test_a_rank_outside_the_world(folder):
    with pytest.raises(ValueError, match="^load_decoder: rank must be 0 to world_size - 1 = 1, got 2$"):
        load_decoder(folder, 2, 2)


def test_no_folder():
    with pytest.raises(UserError, match="^meta-llama/Llama-3.1-8B: no such folder"):
        load_decoder("meta-llama/Llama-3.1-8B")
