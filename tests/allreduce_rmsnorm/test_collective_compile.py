"""torch's own view of the collectives: opcheck, fake tensors, torch.compile with fullgraph, order of calls."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from tokenweave_ops import Workspace, testing

family = testing.family("allreduce_rmsnorm")
BF16 = torch.bfloat16
OPS = ["allreduce_rmsnorm_", "allreduce_rmsnorm", "allreduce_", "allreduce", "gather_residual_"]


@pytest.fixture
def workspace(backend):
    device = "simt" if backend.name == "simt" else backend.device
    with backend.use(family), Workspace.virtual(2, 16, 64, BF16, device=device) as made:
        yield made


def samples(backend, workspace, num_tokens=6):
    x = backend.tensor(2, num_tokens, 64, dtype=BF16, seed=1)
    residual = backend.tensor(2, num_tokens, 64, dtype=BF16, seed=2)
    weight = backend.tensor(64, dtype=BF16, seed=3)
    # In place means inside the workspace, and opcheck works on copies: an empty tensor may be anywhere.
    nothing, empty_residual = workspace.empty(0), residual[:, :0]
    return {
        "allreduce_rmsnorm_": (nothing, empty_residual, weight, workspace.token, workspace.id, 1e-6, 0.0, 0, 0, 0),
        "allreduce_rmsnorm": (x, residual, weight, workspace.token, workspace.id, 1e-6, 1.0, 1, 0, 3),
        "allreduce_": (nothing, workspace.token, workspace.id, 0, 0),
        "allreduce": (x, workspace.token, workspace.id, 1, 0),
        "gather_residual_": (residual, workspace.token, workspace.id, 0, 0),
    }


@pytest.mark.parametrize("op", OPS)
def test_opcheck(backend, workspace, op):
    torch.library.opcheck(getattr(backend.ops, op).default, samples(backend, workspace)[op])


@pytest.mark.no_launch
def test_fake_outputs_have_the_real_metadata(backend, workspace):
    for op in ("allreduce_rmsnorm", "allreduce"):
        arguments = samples(backend, workspace)[op]
        strided = (torch.empty(2, 6, 65, dtype=BF16, device=backend.device)[:, :, 1:], *arguments[1:])
        fakes = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in strided]
        real, fake = (getattr(backend.ops, op)(*a) for a in (strided, fakes))
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


def layer(x, residual, weight, workspace):
    """The tail of a row-parallel layer and the head of the next, as compiled code would have it."""
    y = family.allreduce_rmsnorm(x * 2, residual, weight, workspace)
    z = family.allreduce(y.relu(), workspace, channel=1)
    family.gather_residual_(residual, workspace)
    return z + residual


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph_equals_eager(backend, workspace, dynamic):
    x, residual, weight = samples(backend, workspace)["allreduce_rmsnorm"][:3]
    torch._dynamo.reset()
    with torch.no_grad():
        expected_residual = residual.clone()
        expected = layer(x, expected_residual, weight, workspace)
        compiled = torch.compile(
            layer, fullgraph=True, dynamic=dynamic, backend="inductor" if backend.name != "simt" else "aot_eager"
        )
        got_residual = residual.clone()
        got = compiled(x, got_residual, weight, workspace)
    assert torch.equal(got_residual, expected_residual)
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)  # inductor may round the surroundings otherwise


def test_token_counts_share_one_graph(backend, workspace):
    graphs = 0

    def count(graph, _inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad():
        for num_tokens in (3, 5, 9):
            x, residual, weight = samples(backend, workspace, num_tokens)["allreduce_rmsnorm"][:3]
            torch._dynamo.mark_dynamic(x, 1)
            torch._dynamo.mark_dynamic(residual, 1)
            got_residual = residual.clone()
            got = compiled(x, got_residual, weight, workspace)
            assert torch.equal(got, layer(x, residual, weight, workspace)) and torch.equal(got_residual, residual)
    assert graphs == 1


@pytest.mark.no_launch
def test_collectives_stay_in_program_order(backend, workspace):
    """Two calls without a common tensor but the token: a compiler that swapped them on one rank would hang all."""

    def two(x, y):
        return family.allreduce(x, workspace), family.allreduce(y, workspace, channel=1)

    orders = []

    def functionalized(graph, example_inputs):
        calls = [node for node in graph.graph.nodes if "auto_functionalized" in str(node.target)]
        orders.append([node.kwargs.get("channel") for node in calls])
        # The second takes the token that the first returned: that is what keeps the order.
        assert len(calls) == 2 and depends_on(calls[1], calls[0])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    with torch.no_grad():
        x = samples(backend, workspace)["allreduce"][0]
        torch.compile(two, fullgraph=True, backend=aot_autograd(fw_compiler=functionalized))(x, x + 1)
    assert orders == [[0, 1]]


def depends_on(node, other) -> bool:
    seen, queue = set(), [node]
    while queue:
        current = queue.pop()
        if current is other:
            return True
        if current not in seen:
            seen.add(current)
            queue += current.all_input_nodes
    return False


@pytest.mark.no_launch
def test_compiled_in_place_form_never_reads_other_memory(backend, workspace):
    """A compiler may hand the op a copy of x. Then it raises; it never sums something else."""

    def layer(x, residual, weight):
        x = x + 1
        family.allreduce_rmsnorm_(x, residual, weight, workspace)
        return x

    residual, weight = samples(backend, workspace)["allreduce_rmsnorm"][1:3]
    placed = workspace.empty(6)
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(RuntimeError, match="x must lie in the workspace's buffer"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(placed, residual, weight)


@pytest.mark.no_launch
def test_schemas_mark_what_is_written(backend):
    written = {
        op: [argument.name for argument in getattr(backend.ops, op).default._schema.arguments if argument.is_write]
        for op in OPS
    }
    assert written == {
        "allreduce_rmsnorm_": ["x", "residual", "token"],
        "allreduce_rmsnorm": ["residual", "token"],
        "allreduce_": ["x", "token"],
        "allreduce": ["token"],
        "gather_residual_": ["residual", "token"],
    }
