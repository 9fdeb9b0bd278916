"""Bad input: one sentence each, the same on every backend, and nothing written."""

from __future__ import annotations

import re

import pytest
import torch

from tokenweave_ops import testing

family = testing.family("allreduce_rmsnorm")


pytestmark = pytest.mark.no_launch


def inputs(backend, dtype=torch.bfloat16):
    x = backend.tensor(4, 16, dtype=dtype, seed=1)
    return x, backend.tensor(4, 16, dtype=dtype, seed=2), backend.tensor(16, dtype=dtype, seed=3)


# name -> (what to do with (x, residual, weight), the message with {device} to be filled in)
BAD = {
    "scalar": (
        lambda x, r, w: (x[0, 0], r[0, 0], w),
        "x must have shape [..., hidden], got a scalar (dtype bf16, device {device})",
    ),
    "no hidden": (
        lambda x, r, w: (x[:, :0], r[:, :0], w[:0]),
        "x must have a last dimension of 1 to 65536, got 0 (dtype bf16, device {device})",
    ),
    "too wide": (
        lambda x, r, w: (x.new_full((1, 65537), 3.0), x.new_full((1, 65537), 3.0), x.new_full((65537,), 3.0)),
        "x must have a last dimension of 1 to 65536, got 65537 (dtype bf16, device {device})",
    ),
    "dtype": (
        lambda x, r, w: (x.double(), r.double(), w.double()),
        "x must be bf16, fp16 or fp32, got fp64 (dtype fp64, device {device})",
    ),
    "integer": (
        lambda x, r, w: (x.int(), r.int(), w.int()),
        "x must be bf16, fp16 or fp32, got int32 (dtype int32, device {device})",
    ),
    "weight dtype": (
        lambda x, r, w: (x, r, w.float()),
        "weight must have the dtype of x, bf16, got fp32 (dtype fp32, device {device})",
    ),
    "weight shape": (
        lambda x, r, w: (x, r, w[:15]),
        "weight must have shape [hidden]=[16], got [15] (dtype bf16, device {device})",
    ),
    "weight rank": (
        lambda x, r, w: (x, r, w[None]),
        "weight must have shape [hidden]=[16], got [1, 16] (dtype bf16, device {device})",
    ),
    "weight stride": (
        lambda x, r, w: (x, r, w.new_zeros(32)[::2]),
        "weight must be contiguous, got stride 2 (dtype bf16, device {device})",
    ),
    "residual shape": (
        lambda x, r, w: (x, r[:3], w),
        "residual must have the shape of x, [4, 16], got [3, 16] (dtype bf16, device {device})",
    ),
    "residual rank": (
        lambda x, r, w: (x, r[None], w),
        "residual must have the shape of x, [4, 16], got [1, 4, 16] (dtype bf16, device {device})",
    ),
    "residual dtype": (
        lambda x, r, w: (x, r.half(), w),
        "residual must have the dtype of x, bf16, got fp16 (dtype fp16, device {device})",
    ),
    "columns": (
        lambda x, r, w: (x.new_zeros(4, 32)[:, ::2], r, w),
        "x must have a contiguous last dimension, got strides [32, 2] (dtype bf16, device {device})",
    ),
    "three strides": (
        lambda x, r, w: (x.new_zeros(4, 4, 4, 32)[:2, :2, :2, :16], x.new_zeros(2, 2, 2, 16), w),
        "x must have rows at one or two strides (call .contiguous()), got shape [2, 2, 2, 16] with strides "
        "[512, 128, 32, 1] (dtype bf16, device {device})",
    ),
    "same tensor": (
        lambda x, r, w: (x, x, w),
        "x must not overlap residual, got memory that is shared with it (dtype bf16, device {device})",
    ),
    "partial overlap": (
        lambda x, r, w: (lambda both: (both[:4], both[3:], w))(x.new_full((7, 16), 3.0)),
        "x must not overlap residual, got memory that is shared with it (dtype bf16, device {device})",
    ),
    "shifted columns": (
        lambda x, r, w: (lambda both: (both[:, :16], both[:, 8:24], w))(x.new_full((4, 32), 3.0)),
        "x must not overlap residual, got memory that is shared with it (dtype bf16, device {device})",
    ),
    "expanded": (
        lambda x, r, w: (x[:1].expand(4, 16), r, w),
        "x must have rows that do not overlap, got strides [0, 1] (dtype bf16, device {device})",
    ),
    "expanded residual": (
        lambda x, r, w: (x, r[:1].expand(4, 16), w),
        "residual must have rows that do not overlap, got strides [0, 1] (dtype bf16, device {device})",
    ),
    "weight inside x": (
        lambda x, r, w: (x, r, x[1]),
        "x must not overlap weight, got memory that is shared with it (dtype bf16, device {device})",
    ),
    "weight inside residual": (
        lambda x, r, w: (x, r, r[3]),
        "residual must not overlap weight, got memory that is shared with it (dtype bf16, device {device})",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tensor(backend, case):
    change, message = BAD[case]
    arguments = change(*inputs(backend))
    before = [tensor.clone() for tensor in arguments]
    device = "cuda:0" if backend.name == "cuda" else "cpu"
    with backend.use(family), pytest.raises(RuntimeError) as error:
        family.add_rms_norm_(*arguments)
    assert str(error.value).splitlines()[0] == "add_rms_norm_: " + message.format(device=device)
    assert all(torch.equal(one, other) for one, other in zip(arguments, before, strict=True)), "nothing may be written"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1e-6}, "add_rms_norm_: eps must be finite and at least 0, got -1e-06"),
        ({"eps": float("nan")}, "add_rms_norm_: eps must be finite and at least 0, got nan"),
        ({"weight_bias": 1e39}, "add_rms_norm_: weight_bias must be finite in fp32, got 1e+39"),
        ({"weight_bias": float("inf")}, "add_rms_norm_: weight_bias must be finite in fp32, got inf"),
    ],
)
def test_bad_scalar(backend, options, message):
    x, residual, weight = inputs(backend)
    before = x.clone(), residual.clone()
    with backend.use(family), pytest.raises(RuntimeError, match=re.escape(message)):
        family.add_rms_norm_(x, residual, weight, **options)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


def test_bad_out(backend):
    x, _, weight = inputs(backend)
    with backend.use(family):
        for out, message in [
            (x[:3].clone(), "rms_norm: out must have the shape of x, [4, 16], got [3, 16]"),
            (x.float(), "rms_norm: out must have the dtype of x, bf16, got fp32"),
            (x, "rms_norm: out must not overlap x, got memory that is shared with it"),
            (x.new_zeros(1, 16).expand(4, 16), "rms_norm: out must have rows that do not overlap, got strides [0, 1]"),
        ]:
            before = out.clone(), x.clone()
            with pytest.raises(RuntimeError, match=re.escape(message)):
                family.rms_norm(x, weight, out=out)
            assert torch.equal(out, before[0]) and torch.equal(x, before[1])


@pytest.mark.parametrize("case", ["scalar", "dtype", "weight shape", "residual shape", "columns", "three strides"])
def test_training_forms_check_the_same(backend, case):
    change, message = BAD[case]
    x, residual, weight = (tensor.requires_grad_(tensor.is_floating_point()) for tensor in change(*inputs(backend)))
    expected = message.format(device="cuda:0" if backend.name == "cuda" else "cpu")
    with backend.use(family):
        with pytest.raises(RuntimeError, match=re.escape("add_rms_norm_train: " + expected)):
            family.add_rms_norm_train(x, residual, weight)
        if not case.startswith("residual"):
            with pytest.raises(RuntimeError, match=re.escape("rms_norm_train: " + expected)):
                family.rms_norm_train(x, weight)
        with pytest.raises(RuntimeError, match="rms_norm_train: eps must be finite and at least 0, got -1"):
            family.rms_norm_train(*(inputs(backend)[i] for i in (0, 2)), eps=-1.0)


def test_a_meta_tensor_among_real_ones(backend):
    x, residual, weight = inputs(backend)
    with backend.use(family):
        with pytest.raises(RuntimeError, match=r"add_rms_norm_: weight must be on the device of x, \w+(:0)?, got meta"):
            family.add_rms_norm_(x, residual, weight.to("meta"))
        with pytest.raises(RuntimeError, match=r"rms_norm: weight must be on the device of x, meta, got "):
            family.rms_norm(x.to("meta"), weight)
        assert family.rms_norm(x.to("meta"), weight.to("meta")).device.type == "meta"


def test_other_device(cuda):
    x, residual, weight = inputs(cuda)
    with pytest.raises(RuntimeError, match="weight must be on the device of x, cuda:0, got cpu"):
        family.add_rms_norm_(x, residual, weight.cpu())


def test_backward_checks_its_inputs(backend):
    x, residual, weight = inputs(backend)
    rstd = torch.ones(4, device=backend.device)
    for arguments, message in [
        ((x.t(), None, x.t(), weight, rstd, 0.0), "h must be contiguous, got strides [1, 16]"),
        ((x, residual[:2], x, weight, rstd, 0.0), "grad_h must have the shape of h, [4, 16], got [2, 16]"),
        ((x, None, x, weight, rstd[:3], 0.0), "rstd must have shape [num_rows]=[4], got [3]"),
        ((x, None, x, weight, rstd.double(), 0.0), "rstd must be fp32, got fp64"),
        ((x.float(), None, x, weight, rstd, 0.0), "grad_y must have the dtype of h, bf16, got fp32"),
    ]:
        with pytest.raises(RuntimeError, match=re.escape("rms_norm_backward: " + message)):
            backend.ops.rms_norm_backward(*arguments)


def test_wrong_type_is_an_error_not_a_crash(backend):
    x, residual, _ = inputs(backend)
    with pytest.raises(RuntimeError, match="weight"):
        backend.ops.add_rms_norm_(x, residual, 3, 1e-6, 0.0)
