"""torch's own view of the ops: opcheck, fake tensors, torch.compile with fullgraph, export of mutation."""

from __future__ import annotations

import pytest
import torch

from tokenweave_ops import testing

family = testing.family("allreduce_rmsnorm")


def sample_inputs(backend, dtype=torch.bfloat16):
    x = backend.tensor(6, 32, dtype=dtype, seed=1)
    residual = backend.tensor(6, 32, dtype=dtype, seed=2)
    weight = backend.tensor(32, dtype=dtype, seed=3)
    return x, residual, weight


def samples(backend):
    x, residual, weight = sample_inputs(backend)
    rstd = torch.rand(6, device=backend.device)
    trainable = [tensor.float().clone().requires_grad_() for tensor in (x, residual, weight)]
    return {
        "rms_norm": (x, weight, 1e-6, 0.0),
        "rms_norm_out": (x, weight, 1e-6, 1.0, torch.empty_like(x)),
        "add_rms_norm_": (x, residual, weight, 1e-6, 0.0),
        "rms_norm_train": (trainable[0], trainable[2], 1e-6, 0.0),
        "add_rms_norm_train": (*trainable, 1e-6, 1.0),
        "rms_norm_backward": (x, residual, x.clone(), weight, rstd, 0.0),
    }


OPS = ["rms_norm", "rms_norm_out", "add_rms_norm_", "rms_norm_train", "add_rms_norm_train", "rms_norm_backward"]


@pytest.mark.parametrize("op", OPS)
def test_opcheck(backend, op):
    torch.library.opcheck(getattr(backend.ops, op).default, samples(backend)[op])


@pytest.mark.no_launch
@pytest.mark.parametrize("op", OPS)
def test_fake_outputs_have_the_real_metadata(backend, op, request):
    inputs = samples(backend)[op]
    fakes = [tensor.detach().to("meta") if isinstance(tensor, torch.Tensor) else tensor for tensor in inputs]
    with torch.no_grad():
        real, fake = (getattr(backend.ops, op)(*arguments) for arguments in (inputs, fakes))
    real, fake = (result if isinstance(result, tuple) else (result,) for result in (real, fake))
    for one, other in zip(real, fake, strict=True):
        if one is not None:
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def block(x, residual, weight):
    """A slice of a transformer: something before, the in-place op, something after that reads both results."""
    x, residual = x * 2, residual + 0.5
    family.add_rms_norm_(x, residual, weight)
    return family.rms_norm(x.relu(), weight) + residual


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph_equals_eager(backend, dynamic):
    inputs = sample_inputs(backend, torch.float32)
    torch._dynamo.reset()
    with backend.use(family):
        expected = block(*inputs)
        compiled = torch.compile(
            block, fullgraph=True, dynamic=dynamic, backend="inductor" if backend.name != "simt" else "aot_eager"
        )
        # Inductor may contract the surrounding multiply-adds; the op itself is called, not re-derived.
        torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-6, atol=1e-6)


def test_compiled_training_step_equals_eager(backend):
    x, residual, weight = sample_inputs(backend, torch.float32)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, residual, weight)]

    def loss(x, residual, weight):
        y, h = family.add_rms_norm_train(x, residual, weight)
        return (y.sin() * h).sum()

    torch._dynamo.reset()
    with backend.use(family):
        expected = torch.autograd.grad(loss(*leaves), leaves)
        actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_token_counts_share_one_graph(backend, training):
    """A new number of tokens must not compile anew: nothing in the fake kernels may pin it."""
    graphs = 0

    def count(graph, _inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def run(x, residual, weight):
        if training:
            y, h = family.add_rms_norm_train(x, residual, weight)
            return family.rms_norm_train(y, weight) + h
        return block(x, residual, weight)

    torch._dynamo.reset()
    with backend.use(family):
        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=count)
        for num_tokens in (3, 5, 9):
            x, residual = (backend.tensor(num_tokens, 32, dtype=torch.float32, seed=s) for s in (1, 2))
            weight = backend.tensor(32, dtype=torch.float32, seed=3)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(compiled(x, residual, weight), run(x.clone(), residual, weight))
    assert graphs == 1


@pytest.mark.no_launch
def test_compile_refuses_grad_too(backend):
    x, residual, weight = sample_inputs(backend, torch.float32)
    torch._dynamo.reset()
    with backend.use(family), pytest.raises(Exception, match="an input requires grad"):
        torch.compile(block, fullgraph=True, backend="aot_eager")(x, residual, weight.requires_grad_())


@pytest.mark.no_launch
def test_schemas_mark_what_is_written(backend):
    written = {
        op: [argument.name for argument in getattr(backend.ops, op).default._schema.arguments if argument.is_write]
        for op in OPS
    }
    assert written == {
        "rms_norm": [],
        "rms_norm_out": ["out"],
        "add_rms_norm_": ["x", "residual"],
        "rms_norm_train": [],
        "add_rms_norm_train": [],
        "rms_norm_backward": [],
    }
