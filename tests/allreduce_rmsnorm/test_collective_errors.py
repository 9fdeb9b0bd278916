"""Bad input to the collectives: one sentence each, the same on every backend, and nothing written. What it does to the
other ranks is in test_processes.py and test_collective_contract.py."""

from __future__ import annotations

import re
import threading

import pytest
import torch

from tokenweave_ops import CommunicationError, Workspace, testing

family = testing.family("allreduce_rmsnorm")
BF16 = torch.bfloat16
pytestmark = pytest.mark.no_launch


@pytest.fixture
def workspace(backend):
    device = "simt" if backend.name == "simt" else backend.device
    with backend.use(family), Workspace.virtual(2, 16, 64, BF16, device=device) as made:
        yield made


def inputs(workspace):
    x = workspace.empty(4)
    x.fill_(1.0)
    residual = torch.full((2, 4, 64), 2.0, dtype=BF16, device=x.device)
    return x, residual, torch.ones(64, dtype=BF16, device=x.device)


def offset_by(tensor, elements):
    """The same values, `elements` elements off a 16-byte boundary."""
    moved = tensor.new_zeros(tensor.numel() + 16)[elements : elements + tensor.numel()].view(tensor.shape)
    return moved.copy_(tensor)


# name -> (what to do with (x, residual, weight, workspace), the message with {device} to be filled in)
BAD = {
    "outside": (
        lambda x, r, w, ws: (x.clone(), r, w),
        "x must lie in the workspace's buffer of 4096 bytes per rank (make it with workspace.empty), got 512 bytes per "
        "rank that are not all in it (dtype bf16, device {device})",
    ),
    "in another workspace": (
        lambda x, r, w, ws: (keep(Workspace.virtual(2, 16, 64, BF16, device=x.device)).empty(4), r, w),
        "x must lie in the workspace's buffer of 4096 bytes per rank (make it with workspace.empty), got 512 bytes per "
        "rank that are not all in it (dtype bf16, device {device})",
    ),
    "beyond the capacity": (
        lambda x, r, w, ws: (beyond(ws, 33), r.new_zeros(2, 33, 64), w),
        "x must lie in the workspace's buffer of 4096 bytes per rank (make it with workspace.empty), got 4224 bytes "
        "per rank that are not all in it (dtype bf16, device {device})",
    ),
    "rows apart": (
        lambda x, r, w, ws: (ws.empty(8)[:, ::2], r, w),
        "x must be contiguous, got strides [6144, 128, 1] (dtype bf16, device {device})",
    ),
    "not on a boundary": (
        lambda x, r, w, ws: (shifted(ws), r, w),
        "x must begin on a 16-byte boundary of the workspace, got byte 2 (dtype bf16, device {device})",
    ),
    "no rank dimension": (
        lambda x, r, w, ws: (x[0], r[0], w),
        "x must have shape [world_size, num_tokens, hidden] with world_size=2, as the ranks are virtual, got [4, 64] "
        "(dtype bf16, device {device})",
    ),
    "hidden": (
        lambda x, r, w, ws: (ws.empty(2, 64)[..., :60], r[..., :60], w[:60]),
        "x must have a last dimension that is a multiple of 8 from 8 to 16384, got 60 (dtype bf16, device {device})",
    ),
    "dtype": (
        lambda x, r, w, ws: (x.view(torch.int16), r, w),
        "x must be bf16, fp16 or fp32, got another dtype (dtype another dtype, device {device})",
    ),
    "weight dtype": (
        lambda x, r, w, ws: (x, r, w.float()),
        "weight must have the dtype of x, bf16, got fp32 (dtype fp32, device {device})",
    ),
    "weight shape": (
        lambda x, r, w, ws: (x, r, w[:56]),
        "weight must have shape [hidden]=[64], got [56] (dtype bf16, device {device})",
    ),
    "weight alignment": (
        lambda x, r, w, ws: (x, r, offset_by(w, 3)),
        "weight must have rows that begin on 16-byte boundaries, got strides [1] and a first element 6 bytes off "
        "(dtype bf16, device {device})",
    ),
    "residual shape": (
        lambda x, r, w, ws: (x, r[:, :3], w),
        "residual must have the shape of x, [2, 4, 64], got [2, 3, 64] (dtype bf16, device {device})",
    ),
    "residual dtype": (
        lambda x, r, w, ws: (x, r.half(), w),
        "residual must have the dtype of x, bf16, got fp16 (dtype fp16, device {device})",
    ),
    "residual alignment": (
        lambda x, r, w, ws: (x, offset_by(r, 1), w),
        "residual must have rows that begin on 16-byte boundaries, got strides [256, 64, 1] and a first element 2 "
        "bytes off (dtype bf16, device {device})",
    ),
    "expanded residual": (
        lambda x, r, w, ws: (x, r[:, :1].expand(2, 4, 64), w),
        "residual must have rows that do not overlap, got strides [256, 0, 1] (dtype bf16, device {device})",
    ),
    "residual is x": (
        lambda x, r, w, ws: (x, x, w),
        "residual must not overlap x, got memory that is shared with it (dtype bf16, device {device})",
    ),
    "weight in x": (
        lambda x, r, w, ws: (x, r, x[1, 2]),
        "x must not overlap weight, got memory that is shared with it (dtype bf16, device {device})",
    ),
    "weight in residual": (
        lambda x, r, w, ws: (x, r, r[1, 3]),
        "residual must not overlap weight, got memory that is shared with it (dtype bf16, device {device})",
    ),
}

kept = []


def keep(workspace):
    kept.append(workspace)
    return workspace


def beyond(workspace, num_tokens):
    x = workspace.empty(16)
    return x.as_strided((2, num_tokens, 64), x.stride())


def shifted(workspace):
    x = workspace.empty(4)
    return x.as_strided(x.shape, x.stride(), x.storage_offset() + 1)


@pytest.mark.parametrize("case", BAD)
def test_bad_tensor(backend, workspace, case):
    change, message = BAD[case]
    arguments = change(*inputs(workspace), workspace)
    before = [tensor.clone() for tensor in arguments]
    device = "cuda:0" if backend.name == "cuda" else "cpu"
    with pytest.raises(RuntimeError) as error:
        family.allreduce_rmsnorm_(*arguments, workspace)
    assert str(error.value).splitlines()[0] == "allreduce_rmsnorm_: " + message.format(device=device)
    assert all(torch.equal(one, other) for one, other in zip(arguments, before, strict=True)), "nothing may be written"
    workspace.check()
    kept.clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1.0}, "allreduce_rmsnorm_: eps must be finite and at least 0, got -1"),
        ({"weight_bias": float("nan")}, "allreduce_rmsnorm_: weight_bias must be finite in fp32, got nan"),
        ({"channel": 2}, "allreduce_rmsnorm_: channel must be 0 to 1, got 2"),
        ({"channel": -1}, "allreduce_rmsnorm_: channel must be 0 to 1, got -1"),
        ({"max_ctas": 129}, "allreduce_rmsnorm_: max_ctas must be 1 to 128, or 0 for the default, got 129"),
        ({"max_ctas": -1}, "allreduce_rmsnorm_: max_ctas must be 1 to 128, or 0 for the default, got -1"),
        (
            {"residual_mode": "whole"},
            "allreduce_rmsnorm_: residual_mode must be 'sharded' or 'replicated', got 'whole'",
        ),
    ],
)
def test_bad_scalar(workspace, options, message):
    x, residual, weight = inputs(workspace)
    with pytest.raises((RuntimeError, ValueError), match=re.escape(message)):
        family.allreduce_rmsnorm_(x, residual, weight, workspace, **options)
    assert (x == 1).all() and (residual == 2).all()


def test_the_other_forms_check_too(workspace):
    x, residual, weight = inputs(workspace)
    large = residual.new_zeros(2, 33, 64)
    for call, message in [
        (lambda: family.allreduce_(residual, workspace), "allreduce_: x must lie in the workspace's buffer"),
        (
            lambda: family.allreduce_(x[..., :63], workspace),
            "allreduce_: x must have a last dimension that is a multiple",
        ),
        (
            lambda: family.allreduce(large, workspace),
            "allreduce: x must fit the workspace's staging of 4096 bytes per rank and channel, got 4224 bytes",
        ),
        (
            lambda: family.allreduce_rmsnorm(large, large.clone(), weight, workspace),
            "allreduce_rmsnorm: x must fit the workspace's staging",
        ),
        (
            lambda: family.allreduce_rmsnorm(residual, residual, weight, workspace),
            "allreduce_rmsnorm: residual must not overlap x",
        ),
        (
            lambda: family.gather_residual_(large, workspace),
            "gather_residual_: residual must fit the workspace's staging",
        ),
        (
            lambda: family.gather_residual_(offset_by(residual, 1), workspace),
            "gather_residual_: residual must have rows that begin on 16-byte boundaries",
        ),
        (
            lambda: family.gather_residual_(residual.permute(1, 0, 2), workspace),
            "gather_residual_: residual must have shape [world_size, num_tokens, hidden] with world_size=2",
        ),
    ]:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            call()
    assert (x == 1).all() and (residual == 2).all()


def test_grad_is_refused(workspace):
    x, residual, weight = inputs(workspace)
    weight.requires_grad_()
    for call in (
        lambda: family.allreduce_rmsnorm_(x, residual, weight, workspace),
        lambda: family.allreduce_rmsnorm(residual, residual.clone(), weight, workspace),
        lambda: family.allreduce(residual.requires_grad_(), workspace),
        lambda: family.gather_residual_(residual, workspace),
    ):
        with pytest.raises(
            RuntimeError, match=r"(allreduce|gather)\w*: an input requires grad, but collective ops have"
        ):
            call()
    assert (x == 1).all()


def test_a_closed_workspace(workspace):
    x, residual, weight = inputs(workspace)
    workspace.close()
    for call in (
        lambda: family.allreduce_rmsnorm_(x, residual, weight, workspace),
        lambda: family.allreduce(residual, workspace),
        workspace.check,
    ):
        with pytest.raises(RuntimeError, match=r"token must belong to an open workspace, got workspace \d+, which is"):
            call()
    with pytest.raises(CommunicationError, match="is closed"):
        workspace.reset()
    assert (x == 1).all()


def test_something_else_than_a_workspace(workspace):
    x, residual, weight = inputs(workspace)
    with pytest.raises(TypeError, match="workspace must be a tokenweave_ops.Workspace, got int"):
        family.allreduce_rmsnorm_(x, residual, weight, workspace.id)


def test_a_token_of_another_device(backend, workspace):
    x = inputs(workspace)[0]
    with pytest.raises(RuntimeError, match="token must|must be on the device of"):
        backend.ops.allreduce_(x, torch.zeros(1, device="meta"), workspace.id, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"hidden": 60}, "hidden must be a multiple of 8 from 8 to 16384, got 60"),
        ({"hidden": 16392}, "hidden must be a multiple of 8 from 8 to 16384, got 16392"),
        ({"dtype": torch.float64}, "dtype must be bf16, fp16 or fp32, got torch.float64"),
        ({"num_channels": 0}, "num_channels must be 1 to 16, got 0"),
        ({"num_channels": 17}, "num_channels must be 1 to 16, got 17"),
        ({"timeout_s": 0}, "timeout_s must be 0.001 to 1e+06, got 0"),
        ({"timeout_s": -1.0}, "timeout_s must be 0.001 to 1e+06, got -1"),
        ({"timeout_s": float("nan")}, "timeout_s must be 0.001 to 1e+06, got nan"),
        ({"timeout_s": 1e9}, "timeout_s must be 0.001 to 1e+06, got 1e+09"),
        ({"world_size": 0}, "world_size must be 1 to 16, got 0"),
        ({"world_size": 17}, "world_size must be 1 to 16, got 17"),
        ({"device": "meta"}, "device must be cpu or cuda, got meta"),
    ],
)
def test_a_workspace_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=re.escape("Workspace: " + message)):
        Workspace.virtual(**({"world_size": 2, "max_tokens": 4, "hidden": 64} | arguments))


def test_no_group_is_assumed():
    with pytest.raises(ValueError, match="group must be a torch.distributed process group, got None"):
        Workspace(None, 4, 64, device="cpu")


def test_tensors_that_do_not_fit(workspace):
    for arguments in ({"num_tokens": 33}, {"num_tokens": 32, "offset_bytes": 16}, {"num_tokens": 1, "offset_bytes": 8}):
        with pytest.raises(ValueError, match="Workspace.empty: num_tokens must fit the buffer of 4096 bytes per rank"):
            workspace.empty(**arguments)
    with pytest.raises(ValueError, match="num_tokens must fit"):
        workspace.empty(-1)


def test_a_busy_channel():
    """Two threads on one channel: one of them is told, whichever comes second, and the other is not disturbed."""
    with Workspace.virtual(2, 4096, 4096, torch.float32) as workspace:
        x = workspace.empty(4096)
        x.zero_()
        refused, finished, start = [], [], threading.Barrier(2)

        def run():
            start.wait()
            for _ in range(4):
                try:
                    family.allreduce_(x, workspace)
                    finished.append(True)
                except RuntimeError as error:
                    refused.append(str(error))

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert finished and refused
        assert all("channel must be free, got channel 0 with another call inside" in text for text in refused)
        family.allreduce_(x, workspace)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu():
    with pytest.raises(ValueError, match="device must be one that torch sees, got cuda"):
        Workspace.virtual(2, 4, 64, device="cuda")
