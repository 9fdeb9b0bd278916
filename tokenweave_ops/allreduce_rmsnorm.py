"""Family allreduce_rmsnorm: RMSNorm, residual add + RMSNorm, and both fused with the sum over ranks before them.

Numeric contract, met by every backend:

- Sum over ranks (``allreduce*``): ``s = round(sum)``, added in fp32, rounded once to the element type. With the peer
  transport the order of the additions is that of the ranks (0, 1, 2, ...), so the bits are the same in every run, on
  every backend, whatever ``max_ctas`` and the other rows. With multimem the switch chooses the order: s may differ in
  the last place between runs. Either way one rank computes a row and hands it to the others: all ranks hold the same
  bits. ``h = round(s + residual)`` then takes the place of the first line below.

- ``h = round(x + residual)``: added in fp32, rounded once to the element type (nearest even). The norm is of this
  rounded ``h``, the value the next layer will read.
- ``rstd = 1 / sqrt(mean(h^2) + eps)``: squares accumulated, divided and rooted in fp32.
- ``y = round((h * rstd) * (weight + weight_bias))``: fp32 products, rounded once to the element type.
- The order of the fp32 additions depends on ``hidden``, on the backend, and on whether the first row and the strides
  are multiples of 16 bytes (on CUDA, other tensors take a kernel that adds in another order). So the same row gives
  the same bits in every run, whatever the other rows, the batch size or the number of threads.
- A NaN anywhere in a row makes the whole row of ``y`` NaN; an infinity makes ``rstd`` 0, hence ``inf * 0 = NaN`` at its
  own place and 0 elsewhere. Other rows are not affected. NaN payloads are not kept.
- Squares are summed in fp32. Where the sum overflows (a few elements of 1e19, or 65,536 of 1e17) ``rstd`` and the row
  are 0; where all squares underflow (elements below about 1e-23) and eps is 0, ``rstd`` is infinite.
- An all-zero row gives exactly 0 for any eps that is not 0 in fp32, and ``0 * inf = NaN`` for eps = 0.

Sources: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019 (the norm); TokenWeave, arXiv 2505.11329
(the fused form). TokenWeave's own kernel rounds four times per element where this one rounds twice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, is_grad_enabled

from tokenweave_ops._library import define_op
from tokenweave_ops._workspace import Workspace

# ---------------------------------------------------------------------------------------------- schemas, fake kernels


def _empty_like_rows(x: Tensor) -> Tensor:
    """Outputs are contiguous whatever the strides of x."""
    return x.new_empty(x.shape)


def _fake_rms_norm_train(x, weight, eps, weight_bias):
    return _empty_like_rows(x), x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)


def _fake_add_rms_norm_train(x, residual, weight, eps, weight_bias):
    y, rstd = _fake_rms_norm_train(x, weight, eps, weight_bias)
    return y, _empty_like_rows(x), rstd


def _setup_rms_norm_train(ctx, inputs, output):
    x, weight, _eps, ctx.weight_bias = inputs
    _y, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, weight, rstd)


def _backward_rms_norm_train(ops, ctx, grad_y, _grad_rstd):
    x, weight, rstd = ctx.saved_tensors
    grad_x, grad_weight = ops.rms_norm_backward(
        grad_y.contiguous(), None, x.contiguous(), weight, rstd, ctx.weight_bias
    )
    return grad_x, grad_weight, None, None


def _setup_add_rms_norm_train(ctx, inputs, output):
    _x, _residual, weight, _eps, ctx.weight_bias = inputs
    _y, h, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(h, weight, rstd)


def _backward_add_rms_norm_train(ops, ctx, grad_y, grad_h, _grad_rstd):
    h, weight, rstd = ctx.saved_tensors
    grad_sum, grad_weight = ops.rms_norm_backward(
        grad_y.contiguous(), grad_h.contiguous(), h, weight, rstd, ctx.weight_bias
    )
    return grad_sum, grad_sum, grad_weight, None, None


def _refuse_second_derivative(ops, ctx, *gradients):
    raise RuntimeError("rms_norm_backward: has no gradient of its own; rms_norm_train is differentiable once")


define_op(
    "rms_norm(Tensor x, Tensor weight, float eps, float weight_bias) -> Tensor",
    fake=lambda x, weight, eps, weight_bias: _empty_like_rows(x),
)
define_op(
    "rms_norm_out(Tensor x, Tensor weight, float eps, float weight_bias, Tensor(a!) out) -> ()",
    fake=lambda x, weight, eps, weight_bias, out: None,
)
define_op(
    "add_rms_norm_(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps, float weight_bias) -> ()",
    fake=lambda x, residual, weight, eps, weight_bias: None,
)
define_op(
    "rms_norm_train(Tensor x, Tensor weight, float eps, float weight_bias) -> (Tensor y, Tensor rstd)",
    fake=_fake_rms_norm_train,
    setup_context=_setup_rms_norm_train,
    backward=_backward_rms_norm_train,
)
define_op(
    "add_rms_norm_train(Tensor x, Tensor residual, Tensor weight, float eps, float weight_bias)"
    " -> (Tensor y, Tensor h, Tensor rstd)",
    fake=_fake_add_rms_norm_train,
    setup_context=_setup_add_rms_norm_train,
    backward=_backward_add_rms_norm_train,
)
define_op(
    "rms_norm_backward(Tensor grad_y, Tensor? grad_h, Tensor h, Tensor weight, Tensor rstd, float weight_bias)"
    " -> (Tensor grad_x, Tensor grad_weight)",
    fake=lambda grad_y, grad_h, h, weight, rstd, weight_bias: (_empty_like_rows(h), torch.empty_like(weight)),
    setup_context=lambda ctx, inputs, output: None,
    backward=_refuse_second_derivative,
)

define_op(
    "allreduce_rmsnorm_(Tensor(a!) x, Tensor(b!) residual, Tensor weight, Tensor(c!) token, int workspace, float eps,"
    " float weight_bias, int residual_mode, int channel, int max_ctas, int tag=0) -> ()",
    fake=lambda x, *_: None,
)
define_op(
    "allreduce_rmsnorm(Tensor x, Tensor(a!) residual, Tensor weight, Tensor(b!) token, int workspace, float eps,"
    " float weight_bias, int residual_mode, int channel, int max_ctas) -> Tensor",
    fake=lambda x, *_: _empty_like_rows(x),
)
define_op(
    "allreduce_(Tensor(a!) x, Tensor(b!) token, int workspace, int channel, int max_ctas) -> ()",
    fake=lambda x, *_: None,
)
define_op(
    "allreduce(Tensor x, Tensor(a!) token, int workspace, int channel, int max_ctas) -> Tensor",
    fake=lambda x, *_: _empty_like_rows(x),
)
define_op(
    "gather_residual_(Tensor(a!) residual, Tensor(b!) token, int workspace, int channel, int max_ctas) -> ()",
    fake=lambda residual, *_: None,
)

# torch.autograd.graph.increment_version without its isinstance check, which costs more than the rest of the checks.
_increment_versions = torch._C._increment_version

# Looked up once: a call costs one dispatch. Tests replace them by their emulated counterparts (testing.emulated).
_rms_norm = torch.ops.tokenweave.rms_norm.default
_rms_norm_out = torch.ops.tokenweave.rms_norm_out.default
_add_rms_norm_ = torch.ops.tokenweave.add_rms_norm_.default
_rms_norm_train = torch.ops.tokenweave.rms_norm_train.default
_add_rms_norm_train = torch.ops.tokenweave.add_rms_norm_train.default
_allreduce_rmsnorm_ = torch.ops.tokenweave.allreduce_rmsnorm_.default
_allreduce_rmsnorm = torch.ops.tokenweave.allreduce_rmsnorm.default
_allreduce_ = torch.ops.tokenweave.allreduce_.default
_allreduce = torch.ops.tokenweave.allreduce.default
_gather_residual_ = torch.ops.tokenweave.gather_residual_.default


def _refuse_grad(op: str, training_op: str) -> None:
    # Here and not in the kernel: torch's stable ABI cannot ask a tensor whether it requires grad.
    raise RuntimeError(
        f"{op}: an input requires grad, but this inference op has no gradient; "
        f"use {training_op}, or call it under torch.no_grad()"
    )


# ----------------------------------------------------------------------------------------------------- public functions


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, weight_bias: float = 0.0, out: Tensor | None = None
) -> Tensor:
    """RMSNorm over the last dimension: ``x / sqrt(mean(x^2) + eps) * (weight + weight_bias)``.

    Numerics: the module's contract, with ``h = x``. No gradient (and no forward-mode AD): see :func:`rms_norm_train`.

    Args:
        x: ``[..., hidden]``, bf16, fp16 or fp32, hidden 1 to 65,536. The last dimension is contiguous; the leading ones
            may be strided as long as they fold into at most two strides (a slice of rows or of heads).
        weight: ``[hidden]``, contiguous, dtype and device of x.
        eps: added to the mean square, at least 0.
        weight_bias: added to the weight in fp32; 1.0 for models that store ``weight - 1`` (Gemma).
        out: where the result goes: shape, dtype and device of x, any strides allowed for x; must not overlap x or
            weight.

    Returns:
        out if given, else a new contiguous tensor like x.

    Raises:
        RuntimeError: an argument does not fit (nothing has been written then), an input requires grad while grad mode
            is on, or no kernels were built for the device.
    """
    if is_grad_enabled() and (x.requires_grad or weight.requires_grad or (out is not None and out.requires_grad)):
        _refuse_grad("rms_norm", "rms_norm_train")
    if out is None:
        return _rms_norm(x, weight, eps, weight_bias)
    _rms_norm_out(x, weight, eps, weight_bias, out)
    _increment_versions((out,))
    return out


def add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, weight_bias: float = 0.0) -> None:
    """Residual add and RMSNorm in place: ``residual <- h = x + residual``, then ``x <- rms_norm(h)``.

    The pair a pre-norm transformer runs twice a layer, in one pass over memory. On CUDA each element is read once and
    written once where rows are multiples of 16 bytes, begin on such a boundary and hold at most 128 KiB; in other rows
    h is read a second time. Numerics: the module's contract. No gradient (and no forward-mode AD): see
    :func:`add_rms_norm_train`.

    Args:
        x: ``[..., hidden]``, bf16, fp16 or fp32, hidden 1 to 65,536; overwritten by the normed sum. The last dimension
            is contiguous; the leading ones may be strided as long as they fold into at most two strides.
        residual: shape, dtype and device of x, its strides may differ; overwritten by the sum. Must not overlap x.
        weight: ``[hidden]``, contiguous, dtype and device of x.
        eps: added to the mean square, at least 0.
        weight_bias: added to the weight in fp32; 1.0 for models that store ``weight - 1`` (Gemma).

    Raises:
        RuntimeError: an argument does not fit (nothing has been written then), an input requires grad while grad mode
            is on, or no kernels were built for the device.
    """
    if is_grad_enabled() and (x.requires_grad or residual.requires_grad or weight.requires_grad):
        _refuse_grad("add_rms_norm_", "add_rms_norm_train")
    _add_rms_norm_(x, residual, weight, eps, weight_bias)
    _increment_versions((x, residual))  # so that autograd notices if it had saved one of them


def rms_norm_train(x: Tensor, weight: Tensor, eps: float = 1e-6, *, weight_bias: float = 0.0) -> Tensor:
    """Differentiable (once) :func:`rms_norm`; keeps x and one fp32 number per row for the backward pass.

    Arguments, errors and forward numerics are those of :func:`rms_norm`. Backward: fp32 throughout; the weight's
    gradient is summed over fixed groups of rows, then over the groups, so it is the same in every run; rounded once at
    the end.
    """
    return _rms_norm_train(x, weight, eps, weight_bias)[0]


def add_rms_norm_train(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, weight_bias: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Differentiable (once) residual add and RMSNorm: returns ``(y, h)``, both new, and leaves the inputs alone.

    ``h = x + residual`` goes to the next residual add, ``y = rms_norm(h)`` to the layer; the gradients of both are
    folded into one pass. Arguments, errors and forward numerics are those of :func:`add_rms_norm_`, but x and residual
    may overlap; backward numerics are those of :func:`rms_norm_train`.
    """
    y, h, _rstd = _add_rms_norm_train(x, residual, weight, eps, weight_bias)
    return y, h


# ------------------------------------------------------------------------------------------------------ over the ranks

_RESIDUAL_MODES = {"sharded": 0, "replicated": 1}


def _check_collective(op: str, workspace: Workspace, channel: int, *tensors: Tensor) -> None:
    if not isinstance(workspace, Workspace):
        raise TypeError(f"{op}: workspace must be a tokenweave_ops.Workspace, got {type(workspace).__name__}")
    if is_grad_enabled() and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors):
        workspace.refuse(channel)
        raise RuntimeError(
            f"{op}: an input requires grad, but collective ops have no gradient; call it under torch.no_grad()"
        )


def _residual_mode(op: str, name: str, workspace: Workspace, channel: int) -> int:
    mode = _RESIDUAL_MODES.get(name)
    if mode is None:
        workspace.refuse(channel)
        raise ValueError(f"{op}: residual_mode must be 'sharded' or 'replicated', got {name!r}")
    return mode


def allreduce_rmsnorm_(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    workspace: Workspace,
    eps: float = 1e-6,
    *,
    weight_bias: float = 0.0,
    residual_mode: str = "sharded",
    channel: int = 0,
    max_ctas: int = 0,
    tag: int = 0,
) -> None:
    """Sum over ranks, residual add and RMSNorm, in place and without a copy: ``h = sum(x over ranks) + residual``, then
    ``x <- rms_norm(h)`` on every rank.

    The tail of every row-parallel layer. Each rank reduces, adds and norms only the rows it owns and hands the result
    to all, so the norm costs 1/world_size of what it costs after an ordinary all-reduce. Rank r owns a contiguous
    range of rows; the first ``num_tokens % world_size`` ranks own one more. Collective: every rank calls it, in the
    same order per channel. Numerics: the module's contract. No gradient.

    Args:
        x: ``[..., hidden]``, contiguous, inside the workspace's buffer (:meth:`Workspace.empty`, or rows of it), at the
            same place on every rank: this rank's partial sums, overwritten by the result. bf16, fp16 or fp32; hidden a
            multiple of 8 up to 16,384; any number of tokens, 0 and fewer than ranks included.
        residual: shape, dtype and device of x, rows at one stride and on 16-byte boundaries, apart from x.
            ``residual_mode="sharded"``: only the rows this rank owns are read, and become h; the others are left
            alone and go stale, until :func:`gather_residual_`. ``"replicated"``: all rows are read and become h on
            every rank, for code that knows nothing of ownership; every rank then adds and norms all rows.
        weight: ``[hidden]``, contiguous and 16-byte aligned, dtype and device of x.
        workspace: its channel ``channel`` must be free.
        eps, weight_bias: as in :func:`rms_norm`.
        max_ctas: on a GPU the blocks per rank at most, 1 to 128; 0 means 16 (fewer for virtual ranks, whose blocks
            must all be resident at once). On a CPU 1 is the calling thread alone, anything else torch's threads. The
            result does not depend on it.
        tag: any 64-bit number that has to be the same on all ranks: what else they must agree on, such as the hash of a
            plan. Ranks with different tags get RankDisagreement.

    With virtual ranks x and residual are ``[world_size, num_tokens, hidden]``.

    Raises:
        RuntimeError, ValueError: an argument does not fit. Nothing has been written here; the other ranks get
            RankDisagreement (on a GPU their x is NaN then).
        CommunicationTimeout, RankDisagreement, PeerLost: see :class:`Workspace`. In compiled code these are
            RuntimeErrors that begin with the same words, and :meth:`Workspace.check` raises the class.

    Source: TokenWeave, arXiv 2505.11329, sections on the fused kernel; rounding and ownership differ, see the contract.
    """
    op = "allreduce_rmsnorm_"
    _check_collective(op, workspace, channel, x, residual, weight)
    mode = _residual_mode(op, residual_mode, workspace, channel)
    workspace.call(
        _allreduce_rmsnorm_,
        x, residual, weight, workspace.token, workspace.id, eps, weight_bias, mode, channel, max_ctas, tag,
        channel=channel,
    )  # fmt: skip
    _increment_versions((x, residual))


def allreduce_rmsnorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    workspace: Workspace,
    eps: float = 1e-6,
    *,
    weight_bias: float = 0.0,
    residual_mode: str = "sharded",
    channel: int = 0,
    max_ctas: int = 0,
) -> Tensor:
    """:func:`allreduce_rmsnorm_` for an x that lies anywhere; returns the normed sum and leaves x alone.

    For compiled code, where a compiler may move tensors: x is copied into the workspace's staging by the same launch,
    the result is copied out. The residual is still updated in place. Bits, other arguments and errors are those of
    :func:`allreduce_rmsnorm_`; x may be strided like that of :func:`rms_norm`, and must fit the staging.
    """
    op = "allreduce_rmsnorm"
    _check_collective(op, workspace, channel, x, residual, weight)
    mode = _residual_mode(op, residual_mode, workspace, channel)
    y = workspace.call(
        _allreduce_rmsnorm,
        x, residual, weight, workspace.token, workspace.id, eps, weight_bias, mode, channel, max_ctas,
        channel=channel,
    )  # fmt: skip
    _increment_versions((residual,))
    return y


def allreduce_(x: Tensor, workspace: Workspace, *, channel: int = 0, max_ctas: int = 0) -> None:
    """Sum over ranks in place: ``x <- round(sum of x over ranks)``. x as in :func:`allreduce_rmsnorm_`."""
    _check_collective("allreduce_", workspace, channel, x)
    workspace.call(_allreduce_, x, workspace.token, workspace.id, channel, max_ctas, channel=channel)
    _increment_versions((x,))


def allreduce(x: Tensor, workspace: Workspace, *, channel: int = 0, max_ctas: int = 0) -> Tensor:
    """Sum over ranks of an x that lies anywhere, as a new tensor. x as in :func:`allreduce_rmsnorm`."""
    _check_collective("allreduce", workspace, channel, x)
    return workspace.call(_allreduce, x, workspace.token, workspace.id, channel, max_ctas, channel=channel)


def gather_residual_(residual: Tensor, workspace: Workspace, *, channel: int = 0, max_ctas: int = 0) -> None:
    """Makes a sharded residual whole: every rank gets the rows that the others own.

    For what reads the residual outside the fused chain: a pipeline stage's boundary, a draft model, a debugger. Goes
    through the workspace's staging. residual as in :func:`allreduce_rmsnorm_`.
    """
    _check_collective("gather_residual_", workspace, channel, residual)
    workspace.call(_gather_residual_, residual, workspace.token, workspace.id, channel, max_ctas, channel=channel)
    _increment_versions((residual,))
