"""Models from folders in the published layouts and back, and the sentence for whatever is not computed here."""

import itertools
import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed: no checkpoint can be read")

from checkpoint_files import DREAM, LLADA, random_tensors, shapes_of, write_checkpoint  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from small_models import CONFIG, CONFIGS, some_tokens  # noqa: E402
from tokenweave_models.common.checkpoint import LocalCheckpoint  # noqa: E402
from tokenweave_models.common.errors import UserError  # noqa: E402
from tokenweave_models.localleap import checkpoint  # noqa: E402
from tokenweave_models.localleap.checkpoint import load_model, save_model  # noqa: E402
from tokenweave_models.localleap.config import DREAM_7B, LLADA_8B, ModelConfig, load_config  # noqa: E402
from tokenweave_models.localleap.model import random_model  # noqa: E402

MODELS = {
    "llada": LLADA,
    "llada, grouped and tied": LLADA | {"n_kv_heads": 2, "weight_tying": True},
    "dream": DREAM,
    "dream, tied": DREAM | {"tie_word_embeddings": True},
}


@pytest.fixture(params=MODELS)
def config(request) -> dict:
    return MODELS[request.param]


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("num_files", [1, 3])
def test_every_tensor_comes_to_its_place(tmp_path, config, num_files):
    tensors = random_tensors(config)
    model = load_model(write_checkpoint(tmp_path, config, tensors, num_files), dtype=torch.float32)
    heads, kv_heads, head_dim = model.config.num_heads, model.config.num_kv_heads, model.config.head_dim
    qkv_rows = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    is_llada = config["model_type"] == "llada"
    found = {
        "model.transformer.wte.weight" if is_llada else "model.embed_tokens.weight": model.embed_tokens.weight,
        "model.transformer.ln_f.weight" if is_llada else "model.norm.weight": model.norm.weight,
    }
    if not model.config.tie_embeddings:
        found["model.transformer.ff_out.weight" if is_llada else "lm_head.weight"] = model.lm_head.weight
    for i, layer in enumerate(model.layers):
        here = f"model.transformer.blocks.{i}." if is_llada else f"model.layers.{i}."
        attention, mlp = ("", "") if is_llada else ("self_attn.", "mlp.")
        norms = ("attn_norm", "ff_norm") if is_llada else ("input_layernorm", "post_attention_layernorm")
        out, gate, down = ("attn_out", "ff_proj", "ff_out") if is_llada else ("o_proj", "gate_proj", "down_proj")
        found[f"{here}{norms[0]}.weight"] = layer.attn_norm.weight
        found[f"{here}{norms[1]}.weight"] = layer.mlp_norm.weight
        for name, rows in zip("qkv", layer.qkv_proj.weight.split(qkv_rows), strict=True):
            found[f"{here}{attention}{name}_proj.weight"] = rows
        if not is_llada:
            for name, rows in zip("qkv", layer.qkv_proj.bias.split(qkv_rows), strict=True):
                found[f"{here}{attention}{name}_proj.bias"] = rows
        found[f"{here}{attention}{out}.weight"] = layer.o_proj.weight
        for name, rows in zip((gate, "up_proj"), layer.gate_up_proj.weight.chunk(2), strict=True):
            found[f"{here}{mlp}{name}.weight"] = rows
        found[f"{here}{mlp}{down}.weight"] = layer.down_proj.weight
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
    assert model.config == load_config(tmp_path)


@pytest.mark.parametrize("stored, published, asked, expected", [
    (torch.bfloat16, {"torch_dtype": "bfloat16"}, None, torch.bfloat16),
    (torch.float32, {"torch_dtype": "bfloat16"}, None, torch.bfloat16),
    (torch.bfloat16, {}, None, torch.bfloat16),
    (torch.float16, {"torch_dtype": "float16"}, torch.float32, torch.float32),
])  # fmt: skip
def test_weights_are_converted(tmp_path, stored, published, asked, expected):
    tensors = random_tensors(LLADA, stored)
    model = load_model(write_checkpoint(tmp_path, LLADA | published, tensors), dtype=asked)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert torch.equal(model.lm_head.weight, tensors["model.transformer.ff_out.weight"].to(expected))


def test_the_published_configs_are_understood(tmp_path):
    llada_sizes = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288,
                   "vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 4096,
                   "mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081}  # fmt: skip
    dream_sizes = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                   "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 131072,
                   "mask_token_id": 151666, "eos_token_id": 151643, "pad_token_id": 151643}  # fmt: skip
    for config, expected in ((LLADA | llada_sizes, LLADA_8B), (DREAM | dream_sizes, DREAM_7B)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert load_config(tmp_path) == expected


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


def test_keys_that_are_left_out(tmp_path):
    def config_of(values) -> ModelConfig:
        (tmp_path / "config.json").write_text(json.dumps(values))
        return load_config(tmp_path)

    llada = config_of(LLADA)
    assert config_of(LLADA | {"model_type": "LLaDA"}) == llada
    assert config_of(LLADA | {"n_kv_heads": None}) == llada
    assert config_of(LLADA | {"embedding_size": None}) == config_of(without(LLADA, "vocab_size")) == llada
    assert config_of(LLADA | {"embedding_size": 96}) == replace(llada, vocab_size=96)
    assert config_of(LLADA | {"mlp_hidden_size": None, "mlp_ratio": 3}) == replace(llada, intermediate=144)
    assert config_of(without(LLADA, "mlp_hidden_size", "mlp_ratio")) == replace(llada, intermediate=192)
    assert config_of(without(LLADA, "eos_token_id") | {"pad_token_id": 7}) == replace(llada, eos_id=7)
    assert config_of(without(LLADA, "rms_norm_eps", "rope_theta", "weight_tying", "max_sequence_length")) == replace(
        llada, norm_eps=1e-5, rope_theta=1e4, tie_embeddings=True, max_positions=1024
    )
    ids = ("mask_token_id", "eos_token_id", "pad_token_id")
    large = config_of(without(LLADA, *ids) | {"embedding_size": 126464})
    assert (large.mask_id, large.eos_id) == (126336, 126081)

    dream = config_of(DREAM)
    assert config_of(DREAM | {"model_type": "dream", "attention_bias": True}) == dream
    assert config_of(without(DREAM, "num_key_value_heads")) == replace(dream, num_kv_heads=6)
    assert config_of(
        without(DREAM, "rms_norm_eps", "rope_theta", "tie_word_embeddings", "max_position_embeddings")
    ) == replace(dream, norm_eps=1e-6, rope_theta=1e4, tie_embeddings=False, max_positions=32768)
    large = config_of(without(DREAM, *ids) | {"vocab_size": 152064})
    assert (large.mask_id, large.eos_id) == (151666, 151643)


# -------------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("name", ["llada", "dream", "small", "dream, tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("max_shard_bytes", [20_000, 10**9])
def test_what_is_saved_is_loaded(tmp_path, name, dtype, max_shard_bytes):
    configs = CONFIGS | {
        "small": replace(CONFIGS["small"], head_dim=12),
        "dream, tied": replace(CONFIGS["dream"], tie_embeddings=True),
    }
    model = random_model(configs[name], seed=0, dtype=dtype)
    folder = tmp_path / "new" / "folder"
    save_model(model, folder, max_shard_bytes=max_shard_bytes)
    again = load_model(folder)
    assert again.config == model.config
    assert again.norm.weight.dtype == dtype
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    with torch.no_grad():
        assert torch.equal(again(some_tokens(2, 7)), model(some_tokens(2, 7)))

    shards = sorted(folder.glob("*.safetensors"))
    if max_shard_bytes == 10**9:
        assert [shard.name for shard in shards] == ["model.safetensors"]
        return
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    held = [[tensor.nbytes for tensor in load_file(shard).values()] for shard in shards]
    assert all(len(sizes) == 1 or sum(sizes) <= max_shard_bytes for sizes in held)
    assert all(sum(one) + sum(next_one) > max_shard_bytes for one, next_one in itertools.pairwise(held))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in model.parameters())


def test_it_is_saved_as_published(tmp_path, config):
    """Every name and shape, every key of ours with the published value."""
    tensors = random_tensors(config)
    model = load_model(write_checkpoint(tmp_path / "theirs", config, tensors), dtype=torch.float32)
    save_model(model, tmp_path / "ours")
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == shapes_of(config)
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    values = json.loads((tmp_path / "ours" / "config.json").read_text())
    own = {"attention_bias", "mlp_bias"}  # which Dream's config.json does not have and its code does not ask
    assert {key: values[key] for key in values if key not in own} == {
        key: config[key] for key in values if key not in own
    }
    assert load_config(tmp_path / "ours") == model.config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head_dim": 16}, "head_dim must be hidden / num_heads = 12, got 16: config.json has no key for it"),
        ({"qkv_bias": True}, "qkv_bias must be False as shifted is, got True: no layout has both"),
        ({"shifted": True}, "qkv_bias must be True as shifted is, got False: no layout has both"),
        (
            {"shifted": True, "qkv_bias": True, "learned_positions": 64},
            "learned_positions must be 0 in a shifted model, got 64: its layout has no tensor for them",
        ),
    ],
)
def test_what_no_layout_can_express_is_not_saved(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"^save_model: {message}$"):
        save_model(random_model(replace(CONFIG, **changes), seed=0), tmp_path)
    assert not os.listdir(tmp_path)


def test_a_model_is_not_overwritten(tmp_path):
    model = random_model(CONFIG, seed=0)
    save_model(model, tmp_path)
    with pytest.raises(UserError, match="holds a model already$"):
        save_model(model, tmp_path)
    (tmp_path / "config.json").unlink()  # as if cut short
    with pytest.raises(UserError, match="holds a model already$"):
        save_model(model, tmp_path)
    with pytest.raises(UserError, match=r"model.safetensors: cannot be made a folder: File exists$"):
        save_model(model, tmp_path / "model.safetensors")


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r"^safetensors is not installed; run: pip install 'tokenweave-ops\[models\]'$"):
        save_model(random_model(CONFIG, seed=0), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# --------------------------------------------------------------------------------------------------- strict about keys


def refused(tmp_path, values: dict) -> str:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as raised:
        load_config(tmp_path)
    message = str(raised.value)
    start = f"{tmp_path / 'config.json'}: "
    assert message.startswith(start)
    return message.removeprefix(start)


@pytest.mark.parametrize(
    "config, keys, message",
    [
        (LLADA, {"model_type": "llada_moe"}, "model_type must be one of llada, dream, got 'llada_moe'"),
        (LLADA, {"model_type": None}, "model_type must be one of llada, dream, got None"),
        (LLADA, {"block_type": "sequential"}, "block_type must be 'llama', got 'sequential'"),
        (LLADA, {"block_type": None}, "block_type must be 'llama', got None"),
        (LLADA, {"activation_type": None}, "activation_type must be 'silu', got None"),
        (LLADA, {"activation_type": "swiglu"}, "activation_type must be 'silu', got 'swiglu'"),
        (LLADA, {"layer_norm_type": "gemma_rms"}, "layer_norm_type must be 'rms', got 'gemma_rms'"),
        (LLADA, {"layer_norm_type": None}, "layer_norm_type must be 'rms', got None"),
        (LLADA, {"layer_norm_with_affine": False}, "layer_norm_with_affine must be True or absent, got False"),
        (LLADA, {"attention_layer_norm": True}, "attention_layer_norm must be False or absent, got True"),
        (LLADA, {"input_emb_norm": True}, "input_emb_norm must be False or absent, got True"),
        (LLADA, {"include_bias": True}, "include_bias must be False or absent, got True"),
        (LLADA, {"include_qkv_bias": True}, "include_qkv_bias must be False or absent, got True"),
        (LLADA, {"bias_for_layer_norm": True}, "bias_for_layer_norm must be False or absent, got True"),
        (LLADA, {"alibi": True}, "alibi must be False or absent, got True"),
        (LLADA, {"rope": False}, "rope must be True, got False"),
        (LLADA, {"rope": None}, "rope must be True, got None"),
        (LLADA, {"rope_full_precision": False}, "rope_full_precision must be True or absent, got False"),
        (LLADA, {"scale_logits": True}, "scale_logits must be False or absent, got True"),
        (LLADA, {"block_group_size": 2}, "block_group_size must be 1 or absent, got 2"),
        (LLADA, {"multi_query_attention": True}, "multi_query_attention must be absent, got True"),
        (LLADA, {"quantization_config": {"bits": 4}}, "quantization_config must be absent, got {'bits': 4}"),
        (LLADA, {"d_model": None}, "d_model is missing"),
        (LLADA, {"n_layers": "32"}, "n_layers must be a whole number from 1 on, got '32'"),
        (LLADA, {"n_heads": 5}, "n_heads must be a divisor of d_model=48, got 5"),
        (LLADA, {"n_kv_heads": 3}, "ModelConfig: num_heads must be a multiple of num_kv_heads, got num_heads=4, "
                                   "num_kv_heads=3"),
        (LLADA, {"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, got 0"),
        (LLADA, {"weight_tying": 1}, "weight_tying must be true or false, got 1"),
        (LLADA, {"mask_token_id": -1}, "mask_token_id must be a whole number from 0 on, got -1"),
        (LLADA, {"mask_token_id": None}, "ModelConfig: mask_id must be 0 to vocab_size - 1 = 79, got 126336"),
        (LLADA, {"eos_token_id": [77, 78]}, "eos_token_id must be a whole number from 0 on, got [77, 78]"),
        (LLADA, {"learned_positions": 8}, "ModelConfig: learned_positions must be 0 or at least max_positions=64, "
                                          "got 8"),
        (DREAM, {"hidden_act": "gelu"}, "hidden_act must be 'silu' or absent, got 'gelu'"),
        (DREAM, {"attention_bias": False}, "attention_bias must be True or absent, got False"),
        (DREAM, {"mlp_bias": True}, "mlp_bias must be False or absent, got True"),
        (DREAM, {"use_mrope": True}, "use_mrope must be False or absent, got True"),
        (DREAM, {"use_sliding_window": True}, "use_sliding_window must be False or absent, got True"),
        (DREAM, {"rope_scaling": {"type": "yarn"}}, "rope_scaling must be absent, got {'type': 'yarn'}"),
        (DREAM, {"rope_parameters": {"rope_theta": 5}}, "rope_parameters must be absent, got {'rope_theta': 5}"),
        (DREAM, {"block_size": 32}, "block_size must be absent, got 32"),
        (DREAM, {"vocab_size": None}, "vocab_size is missing"),
        (DREAM, {"num_attention_heads": 48}, "ModelConfig: head_dim must be even (rotary pairs), got 1"),
    ],
)  # fmt: skip
def test_what_is_not_computed_here_is_refused_by_its_key(tmp_path, config, keys, message):
    assert refused(tmp_path, config | keys) == message


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=3,
)


@given(
    base=st.sampled_from([LLADA, DREAM]),
    changes=st.dictionaries(st.sampled_from(sorted({*LLADA, *DREAM, "block_size"})), ANY_JSON, min_size=1),
)
@example(base=LLADA, changes={"model_type": ["llada"]})
@example(base=LLADA, changes={"vocab_size": "80", "embedding_size": None})
def test_any_value_is_understood_or_refused(tmp_path_factory, base, changes):
    folder = tmp_path_factory.getbasetemp()
    (folder / "config.json").write_text(json.dumps(base | changes))
    message = None
    try:
        load_config(folder)
    except UserError as error:
        message = str(error)
    assert message is None or message.startswith(f"{folder / 'config.json'}: ")


# ------------------------------------------------------------------------------------------------ strict about tensors


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


def load_error(tmp_path, config, tensors, opened) -> str:
    """The refusal of these tensors, which comes before anything was read."""
    with pytest.raises(UserError) as raised:
        load_model(write_checkpoint(tmp_path, config, tensors))
    assert opened[0].bytes_read == 0
    message = str(raised.value)
    start = f"{tmp_path}: the tensors do not fit its config.json. "
    assert message.startswith(start)
    return message.removeprefix(start)


def test_all_that_is_wrong_is_told_at_once(tmp_path, opened):
    tensors = random_tensors(LLADA)
    for name in [name for name in tensors if "blocks.1.ff" in name or "ff_out" in name]:
        del tensors[name]
    tensors["model.transformer.blocks.0.q_proj.bias"] = torch.zeros(48)
    tensors["model.transformer.wte.weight"] = torch.zeros(79, 48)
    assert load_error(tmp_path, LLADA, tensors, opened) == (
        "5 missing: model.transformer.blocks.0.ff_out.weight, model.transformer.blocks.1.ff_norm.weight, "
        "model.transformer.blocks.1.ff_proj.weight and 2 more. "
        "1 superfluous: model.transformer.blocks.0.q_proj.bias. "
        "1 of another shape: model.transformer.wte.weight is [79, 48] instead of [80, 48]"
    )


def test_a_missing_bias(tmp_path, opened):
    tensors = without(random_tensors(DREAM), "model.layers.1.self_attn.k_proj.bias")
    assert load_error(tmp_path, DREAM, tensors, opened) == "1 missing: model.layers.1.self_attn.k_proj.bias"


def test_tensors_of_another_kind(tmp_path, opened):
    tensors = random_tensors(DREAM)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    assert load_error(tmp_path, DREAM, tensors, opened) == (
        "1 of a dtype other than F64, F32, F16, BF16: model.norm.weight is I8"
    )


@pytest.mark.parametrize(
    "config, name",
    [
        (LLADA, "lm_head.weight"),
        (LLADA, "model.transformer.wpe.weight"),
        (LLADA, "model.transformer.emb_norm.weight"),
        (LLADA, "model.transformer.blocks.2.attn_norm.weight"),
        (LLADA, "model.transformer.blocks.0.q_norm.weight"),
        (DREAM, "model.layers.0.self_attn.q_norm.weight"),
        (DREAM, "model.layers.0.self_attn.o_proj.bias"),
        (DREAM, "model.transformer.ff_out.weight"),
        (DREAM, "lm_head.weight_scale"),
    ],
)
def test_a_superfluous_tensor(tmp_path, opened, config, name):
    tensors = random_tensors(config) | {name: torch.ones(3)}
    assert load_error(tmp_path, config, tensors, opened) == f"1 superfluous: {name}"


def test_harmless_tensors_are_left_alone(tmp_path):
    nothing = torch.full((80, 48), torch.nan)
    for number, (config, extra) in enumerate(
        (
            (LLADA | {"weight_tying": True}, {"model.transformer.ff_out.weight": nothing}),
            (DREAM | {"tie_word_embeddings": True}, {"lm_head.weight": nothing}),
            (
                DREAM,
                {
                    "model.rotary_emb.inv_freq": nothing,
                    "model.layers.1.self_attn.rotary_emb.inv_freq": nothing[0].clone(),
                },
            ),
        )
    ):
        model = load_model(write_checkpoint(tmp_path / str(number), config, random_tensors(config) | extra))
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_learned_positions_are_loaded_when_the_config_has_them(tmp_path, opened):
    config = LLADA | {"learned_positions": 64}
    assert load_error(tmp_path, config, random_tensors(config), opened) == "1 missing: model.transformer.wpe.weight"


def test_no_folder():
    with pytest.raises(UserError, match="^GSAI-ML/LLaDA-8B-Instruct: no such folder"):
        load_model("GSAI-ML/LLaDA-8B-Instruct")
