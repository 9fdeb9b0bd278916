"""Sizes of the models that TokenWeave's authors measured, and of a few others, by name."""

from tokenweave_ops import ModelShape

MODEL_SHAPES = {
    "llama-3.3-70b": ModelShape(
        hidden=8192,
        intermediate=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
    ),
    "qwen2.5-72b": ModelShape(
        hidden=8192,
        intermediate=29568,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=152064,
    ),
    "mixtral-8x22b": ModelShape(
        hidden=6144,
        intermediate=16384,
        num_layers=56,
        num_heads=48,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=32768,
        num_experts=8,
        experts_per_token=2,
    ),
    "llama-3.1-8b": ModelShape(
        hidden=4096,
        intermediate=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
    ),
}
