"""Which config.json is understood, and which is refused, by the key that asks for what is not computed here."""

import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenweave_models.common.errors import UserError
from tokenweave_models.tokenweave.checkpoint import load_config
from tokenweave_models.tokenweave.config import ModelConfig, RopeScaling
from tokenweave_models.tokenweave.tensor_parallel import parts_of

LLAMA = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "torch_dtype": "float32",
    "attention_bias": False,
    "mlp_bias": False,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
LLAMA3_FACTORS = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA3_ROPE = {"rope_type": "llama3"} | LLAMA3_FACTORS


def config_of(tmp_path, values: dict) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(values))
    return load_config(tmp_path)


def refused(tmp_path, values: dict) -> str:
    with pytest.raises(UserError) as raised:
        config_of(tmp_path, values)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: ")
    return message.removeprefix(f"{tmp_path / 'config.json'}: ")


def test_every_key_has_its_place(tmp_path):
    expected = ModelConfig(
        vocab_size=67,
        hidden=24,
        intermediate=40,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        head_dim=6,
        norm_eps=1e-5,
        rope_theta=5e5,
        max_len=64,
    )
    assert config_of(tmp_path, LLAMA) == expected
    assert config_of(tmp_path, QWEN2) == ModelConfig(**vars(expected) | {"qkv_bias": True})
    assert config_of(tmp_path, MIXTRAL) == ModelConfig(**vars(expected) | {"num_experts": 3, "experts_per_token": 2})
    assert config_of(tmp_path, LLAMA | {"tie_word_embeddings": True}) == ModelConfig(
        **vars(expected) | {"tie_embeddings": True}
    )


@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads", "rope_scaling", "sliding_window", "hidden_act"])
def test_a_key_that_is_null_is_one_left_out(tmp_path, key):
    values = LLAMA | {"hidden_size": 64}
    values.pop(key, None)
    assert config_of(tmp_path, values | {key: None}) == config_of(tmp_path, values)


def test_heads_that_follow_from_others(tmp_path):
    config = config_of(tmp_path, LLAMA | {"hidden_size": 64, "head_dim": None, "num_key_value_heads": None})
    assert (config.head_dim, config.num_kv_heads) == (8, 8)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 7e4, "rope_scaling": LLAMA3_ROPE},  # transformers 4
        {"rope_theta": 7e4, "rope_scaling": {"type": "llama3"} | LLAMA3_FACTORS},  # and earlier
        {"rope_theta": None, "rope_parameters": LLAMA3_ROPE | {"rope_theta": 7e4}},  # transformers 5
    ],
)
def test_llama3_rope_in_either_form(tmp_path, keys):
    config = config_of(tmp_path, LLAMA | keys)
    assert config.rope_theta == 7e4
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 32)


@pytest.mark.parametrize(
    "keys",
    [{"rope_scaling": {"rope_type": "default"}}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}],
)
def test_default_rope_is_no_scaling(tmp_path, keys):
    assert config_of(tmp_path, LLAMA | keys) == config_of(tmp_path, LLAMA)


@pytest.mark.parametrize(
    "config, keys, message",
    [
        (LLAMA, {"model_type": "gemma2"}, "model_type must be one of llama, qwen2, mixtral, got 'gemma2'"),
        (LLAMA, {"model_type": None}, "model_type must be one of llama, qwen2, mixtral, got None"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act must be 'silu' or absent, got 'gelu'"),
        (LLAMA, {"attention_bias": True}, "attention_bias must be False or absent, got True"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias must be False or absent, got True"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1 or absent, got 0.5"),
        (
            LLAMA,
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config must be absent, got {'quant_method': 'fp8'}",
        ),
        (
            QWEN2,
            {"use_sliding_window": True},
            "sliding_window must be null or at least max_position_embeddings=64, got 16",
        ),
        (MIXTRAL, {"sliding_window": 63}, "sliding_window must be null or at least max_position_embeddings=64, got 63"),
        (
            QWEN2,
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types must be full_attention in every layer, got ['full_attention', 'sliding_attention']",
        ),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling.rope_type must be default or llama3, got 'yarn'",
        ),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "rope_scaling.type must be default or llama3, got 'linear'"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling must be an object, got 'linear'"),
        (
            LLAMA,
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters must be the same for all layers, got {'full_attention': {'rope_type': 'default'}}",
        ),
        (LLAMA, {"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta must be a positive number, got 0"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor is missing"),
        (
            LLAMA,
            {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}},
            "rope_scaling.low_freq_factor must be less than 1.0, got 1.0",
        ),
        (LLAMA, {"hidden_size": None}, "hidden_size is missing"),
        (LLAMA, {"hidden_size": "24"}, "hidden_size must be a whole number from 1 on, got '24'"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers must be a whole number from 1 on, got 0"),
        (LLAMA, {"num_attention_heads": True}, "num_attention_heads must be a whole number from 1 on, got True"),
        (LLAMA, {"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number, got '1e-5'"),
        (LLAMA, {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
        (
            LLAMA,
            {"num_key_value_heads": 3},
            "ModelConfig: num_heads must be a multiple of num_kv_heads, got num_heads=8, num_kv_heads=3",
        ),
        (MIXTRAL, {"num_local_experts": None}, "num_local_experts is missing"),
    ],
)
def test_what_is_not_computed_here_is_refused_by_its_key(tmp_path, config, keys, message):
    assert refused(tmp_path, config | keys) == message


KEYS = sorted({*LLAMA, *QWEN2, *MIXTRAL, "rope_scaling", "rope_parameters", "layer_types", "quantization_config"})
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "factor"]), inner),
    max_leaves=5,
)


@given(
    base=st.sampled_from([LLAMA, QWEN2, MIXTRAL]), changes=st.dictionaries(st.sampled_from(KEYS), ANY_JSON, min_size=1)
)
@example(base=LLAMA, changes={"rms_norm_eps": 10**400})
@example(base=LLAMA, changes={"model_type": ["llama"]})
@example(base=LLAMA, changes={"layer_types": 5})
@example(base=LLAMA, changes={"layer_types": [{}]})
@example(base=LLAMA, changes={"num_hidden_layers": 10**30})
def test_any_value_is_understood_or_refused(tmp_path_factory, base, changes):
    folder = tmp_path_factory.getbasetemp()
    message = None
    try:
        config_of(folder, base | changes)
    except UserError as error:
        message = str(error)
    assert message is None or message.startswith(f"{folder / 'config.json'}: ")


def test_a_long_value_is_cut(tmp_path):
    assert len(refused(tmp_path, LLAMA | {"quantization_config": {"modules_to_not_convert": ["lm_head"] * 99}})) < 130


@pytest.mark.parametrize(
    "config, keys",
    [
        (QWEN2, {"use_sliding_window": False}),
        (QWEN2, {"use_sliding_window": True, "max_window_layers": 2}),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 64}),
        (QWEN2, {"layer_types": ["full_attention"] * 2}),
        (MIXTRAL, {"sliding_window": 64}),
        (MIXTRAL, {"sliding_window": None}),
    ],
)
def test_a_window_that_never_shows_is_accepted(tmp_path, config, keys):
    config_of(tmp_path, config | keys)


# The sizes of published models, and how many parameters their files hold.
PUBLISHED = {
    "Llama-3.3-70B": (
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rope_theta": 5e5,
            "rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 8192},
        },
        70_553_706_496,
    ),
    "Qwen2.5-72B": (
        {
            "model_type": "qwen2",
            "vocab_size": 152064,
            "hidden_size": 8192,
            "intermediate_size": 29568,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "max_window_layers": 70,
            "sliding_window": 131072,
            "use_sliding_window": False,
            "rope_theta": 1e6,
        },
        72_706_203_648,
    ),
    "Mixtral-8x22B": (
        {
            "model_type": "mixtral",
            "vocab_size": 32000,
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "num_hidden_layers": 56,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 65536,
            "sliding_window": None,
            "rope_theta": 1e6,
        },
        140_620_634_112,
    ),
}


@pytest.mark.parametrize("values, num_parameters", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_models_are_understood(tmp_path, values, num_parameters):
    config = config_of(tmp_path, values | {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu"})
    assert config.head_dim == 128
    assert sum(math.prod(part.source_shape) for part in parts_of(config, 0, 1)) == num_parameters
