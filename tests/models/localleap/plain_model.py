"""LLaDA's forward pass from the formulas: one sequence, float64, loops over heads, complex rotation."""

from math import sqrt

import torch
from torch import Tensor


def plain_llada(
    config: dict,
    weights: dict[str, Tensor],
    tokens: Tensor,
    positions: Tensor | None = None,
    stale: list[tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The logits of these tokens, and each layer's keys before RoPE and values, both [sequence, features].

    With stale ones from an earlier pass over the whole sequence, only the tokens at the positions are computed: their
    keys and values take the place of the stale ones, and every key is rotated anew, as in Fast-dLLM.
    """
    w = {name.removeprefix("model.transformer."): tensor.double() for name, tensor in weights.items()}
    heads, kv_heads = config["n_heads"], config["n_kv_heads"]
    head_dim = config["d_model"] // heads
    if positions is None:
        positions = torch.arange(len(tokens))

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weight

    def rotated(head, places):
        half = head_dim // 2
        angle = places[:, None] * config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        turned = torch.complex(head[:, :half], head[:, half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), dim=-1)

    stream = w["wte.weight"][tokens]
    seen = []
    for i in range(config["n_layers"]):
        layer = {name.split(".", 2)[2]: tensor for name, tensor in w.items() if name.startswith(f"blocks.{i}.")}
        x = norm(stream, layer["attn_norm.weight"])
        q, keys, values = (x @ layer[f"{name}_proj.weight"].T for name in "qkv")
        if stale is not None:
            keys = stale[i][0].index_copy(0, positions, keys)
            values = stale[i][1].index_copy(0, positions, values)
        seen.append((keys, values))
        mixed = []
        for head in range(heads):
            own = slice(head * head_dim, (head + 1) * head_dim)
            shared = head // (heads // kv_heads)
            columns = slice(shared * head_dim, (shared + 1) * head_dim)
            turned = rotated(keys[:, columns], torch.arange(len(keys)))
            scores = rotated(q[:, own], positions) @ turned.T / sqrt(head_dim)
            shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
            mixed.append(shares @ values[:, columns])
        stream = stream + torch.cat(mixed, dim=-1) @ layer["attn_out.weight"].T
        x = norm(stream, layer["ff_norm.weight"])
        gate = x @ layer["ff_proj.weight"].T
        stream = stream + (gate / (1 + (-gate).exp()) * (x @ layer["up_proj.weight"].T)) @ layer["ff_out.weight"].T
    return norm(stream, w["ln_f.weight"]) @ w.get("ff_out.weight", w["wte.weight"]).T, seen
