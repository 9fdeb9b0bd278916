"""How an inference engine takes the fused op in: an ordinary torch model, patched from outside. Two methods change.

    python examples/engine_integration.py                            # starts two processes itself
    torchrun --nproc-per-node=2 examples/engine_integration.py

The model below is what engines have and knows nothing of this package: row-parallel linears that end in an all-reduce,
and norms that take (x, residual). `patch` makes their GEMMs write partial sums straight into a workspace that the ranks
share, and lets the norm that follows do the sum, the residual addition and itself in one pass. `patch_for_compile` does
the same for torch.compile, which moves tensors as it likes: there the functional op takes a tensor that lies anywhere.
"""

import os
import sys
from time import perf_counter
from types import MethodType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import tokenweave_ops as tw

DEVICE, BACKEND, DTYPE = "cpu", "gloo", torch.bfloat16  # on GPUs: f"cuda:{LOCAL_RANK}" and "nccl"
HIDDEN, HEADS, LAYERS, TOKENS = 512, 8, 2, 256


# ---------------------------------------------------------------------------------------- a model, as engines have it


class RowParallelLinear(nn.Linear):
    """Each rank holds some of the input features, so each has a partial sum of the output."""

    def __init__(self, in_features: int, out_features: int, group: dist.ProcessGroup):
        super().__init__(in_features // group.size(), out_features, bias=False)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        dist.all_reduce(y, group=self.group)
        return y


class AddRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        residual = x if residual is None else x + residual
        return super().forward(residual), residual


class Layer(nn.Module):
    def __init__(self, group: dist.ProcessGroup):
        super().__init__()
        share = HIDDEN // group.size()
        self.heads = HEADS // group.size()
        self.input_norm = AddRMSNorm(HIDDEN, eps=1e-6)
        self.qkv_proj = nn.Linear(HIDDEN, 3 * share, bias=False)
        self.o_proj = RowParallelLinear(HIDDEN, HIDDEN, group)
        self.post_attention_norm = AddRMSNorm(HIDDEN, eps=1e-6)
        self.up_proj = nn.Linear(HIDDEN, 4 * share, bias=False)
        self.down_proj = RowParallelLinear(4 * HIDDEN, HIDDEN, group)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        x, residual = self.input_norm(x, residual)
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)  # [heads, tokens, head_dim]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x, residual = self.post_attention_norm(self.o_proj(mixed.transpose(0, 1).flatten(1)), residual)
        return self.down_proj(F.silu(self.up_proj(x))), residual


class Model(nn.Module):
    def __init__(self, group: dist.ProcessGroup):
        super().__init__()
        self.layers = nn.ModuleList(Layer(group) for _ in range(LAYERS))
        self.norm = AddRMSNorm(HIDDEN, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual)
        return self.norm(x, residual)[0]


# ------------------------------------------------------------------------------------------------------------ the patch


def patch(model: nn.Module, workspace: tw.Workspace) -> nn.Module:
    """Zero-copy, for eager code and CUDA graphs: x stays in the workspace from the GEMM to the normed sum.

    So does what the model returns: read it before the next forward pass writes there.
    """

    def row_parallel(self: RowParallelLinear, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight.T, out=workspace.empty(x.shape[0]))  # no all_reduce: the norm does it

    def add_norm(self: AddRMSNorm, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if residual is None:
            return tw.rms_norm(x, self.weight, self.eps), x.clone()  # the op updates the residual in place
        tw.allreduce_rmsnorm_(x, residual, self.weight, workspace, self.eps)
        return x, residual

    return replace_forward(model, row_parallel, add_norm)


def patch_for_compile(model: nn.Module, workspace: tw.Workspace) -> nn.Module:
    """For torch.compile(fullgraph=True): the op copies x into the workspace's staging by itself."""

    def row_parallel(self: RowParallelLinear, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def add_norm(self: AddRMSNorm, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if residual is None:
            return tw.rms_norm(x, self.weight, self.eps), x.clone()
        return tw.allreduce_rmsnorm(x, residual, self.weight, workspace, self.eps), residual

    return replace_forward(model, row_parallel, add_norm)


def replace_forward(model: nn.Module, row_parallel, add_norm) -> nn.Module:
    for module in model.modules():
        if isinstance(module, RowParallelLinear):
            module.forward = MethodType(row_parallel, module)
        elif isinstance(module, AddRMSNorm):
            module.forward = MethodType(add_norm, module)
    return model


# ----------------------------------------------------------------------------------------------------------- the proof


def median_ms(model: nn.Module, x: Tensor, group: dist.ProcessGroup, runs: int = 15) -> float:
    times = []
    for _ in range(runs):
        dist.barrier(group)
        begin = perf_counter()
        model(x)
        times.append(perf_counter() - begin)
    return sorted(times)[runs // 2] * 1e3


@torch.no_grad()
def main() -> None:
    dist.init_process_group(BACKEND)
    group = dist.group.WORLD  # an engine passes its tensor-parallel group

    def new_model() -> Model:
        torch.manual_seed(group.rank())  # every rank holds other shares of the weights
        model = Model(group)
        for module in model.modules():
            if isinstance(module, AddRMSNorm):
                module.weight.copy_(torch.linspace(0.5, 1.5, HIDDEN))  # a patch that forgot it would show
        return model.to(DEVICE, DTYPE)

    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)  # and the same tokens
    exact = new_model().double()(x.double())

    with tw.Workspace(group, max_tokens=TOKENS, hidden=HIDDEN, dtype=DTYPE, device=DEVICE) as workspace:
        models = {
            "unpatched": new_model(),
            "patched": patch(new_model(), workspace),
            "patched, compiled": torch.compile(patch_for_compile(new_model(), workspace), fullgraph=True),
        }
        error, ms = {}, {}
        for name, candidate in models.items():
            error[name] = (candidate(x).double() - exact).abs().max().item()
            ms[name] = median_ms(candidate, x, group)

        # Both round to DTYPE at the same places, in other orders: within twice the unpatched model's own error.
        limit = 2 * error["unpatched"] + 2 * torch.finfo(DTYPE).eps * exact.abs().max().item()
        if group.rank() == 0:
            print(f"{2 * LAYERS} row-parallel GEMMs now write into {workspace}")
            for name in models:
                print(f"{name:<18} error against float64 {error[name]:.4f} (limit {limit:.4f}), {ms[name]:.2f} ms")
        wrong = [name for name in models if not error[name] <= limit]
    dist.destroy_process_group()
    if wrong:
        sys.exit(f"rank {group.rank()}: {', '.join(wrong)}: results differ from the unpatched model's")


if __name__ == "__main__":
    if "RANK" not in os.environ:  # not under torchrun yet
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
        os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])
    main()
