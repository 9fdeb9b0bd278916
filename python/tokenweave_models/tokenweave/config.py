"""What a decoder of the Llama family is made of: Llama 3, Qwen2 and 2.5, Mixtral."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretched rotary positions: low frequencies are divided by factor, high ones kept, blended between.

    Frequencies with more than ``high_freq_factor`` turns within ``original_max_len`` tokens are high, with fewer than
    ``low_freq_factor`` low.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder. num_experts 0 is a dense MLP, otherwise every MLP is a mixture of experts."""

    vocab_size: int = 256
    hidden: int = 1024
    intermediate: int = 2816
    num_layers: int = 8
    num_heads: int = 16
    num_kv_heads: int = 4
    head_dim: int = 0  # 0: hidden / num_heads
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    tie_embeddings: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    max_len: int = 4096  # positions

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden", "intermediate", "num_layers", "num_heads", "num_kv_heads", "max_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig: {name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim == 0:
            if self.hidden % (2 * self.num_heads):
                raise ValueError(
                    f"ModelConfig: hidden must be a multiple of 2 * num_heads (rotary pairs), got "
                    f"hidden={self.hidden}, num_heads={self.num_heads}"
                )
            object.__setattr__(self, "head_dim", self.hidden // self.num_heads)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"ModelConfig: head_dim must be even (rotary pairs), got {self.head_dim}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig: num_heads must be a multiple of num_kv_heads, got num_heads={self.num_heads}, "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"ModelConfig: experts_per_token must be 1 to num_experts={self.num_experts}, got "
                f"{self.experts_per_token}"
            )

    def check_world_size(self, world_size: int) -> None:
        if world_size < 1:
            raise ValueError(f"ModelConfig: world_size must be at least 1, got {world_size}")
        for name in ("num_heads", "num_kv_heads", "intermediate"):
            if getattr(self, name) % world_size:
                raise ValueError(
                    f"ModelConfig: {name} must be a multiple of world_size, got {name}={getattr(self, name)}, "
                    f"world_size={world_size}"
                )
        if self.vocab_size < world_size:
            raise ValueError(
                f"ModelConfig: vocab_size must be at least world_size, got vocab_size={self.vocab_size}, "
                f"world_size={world_size}"
            )
