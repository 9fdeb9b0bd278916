"""Handwritten Hopper kernels as torch ops, with native CPU kernels of the same meaning.

>>> import torch, tokenweave_ops
>>> x, residual, weight = torch.randn(4, 64), torch.randn(4, 64), torch.ones(64)
>>> tokenweave_ops.add_rms_norm_(x, residual, weight)  # residual += x; x = rms_norm(residual)

``python -m tokenweave_ops.info`` says which kernels were built and which load.
"""

try:
    import torch  # noqa: F401
except ModuleNotFoundError:
    raise ImportError("tokenweave_ops needs torch >= 2.11: pip install torch") from None

from tokenweave_ops import _library, template_op  # noqa: F401  (template_op defines its op; it is not re-exported)
from tokenweave_ops._decode_requests import POLICIES, DecodeRequests
from tokenweave_ops._emulated_link import EmulatedLink
from tokenweave_ops._errors import CommunicationError, CommunicationTimeout, PeerLost, RankDisagreement
from tokenweave_ops._sinr_tables import GeometryTable, LogTable, PowerTable, SinrGrid, TwoSidedTable, mark_table
from tokenweave_ops._workspace import Workspace
from tokenweave_ops.allreduce_rmsnorm import (
    add_rms_norm_,
    add_rms_norm_train,
    allreduce,
    allreduce_,
    allreduce_rmsnorm,
    allreduce_rmsnorm_,
    gather_residual_,
    rms_norm,
    rms_norm_train,
)
from tokenweave_ops.anchor_decoding import (
    DecodeStep,
    RowScan,
    confidence_scan,
    decode_step_,
    select_and_commit_,
)
from tokenweave_ops.batch_split import HalfBatch, split_batch
from tokenweave_ops.sinr_field import (
    ConditionalSums,
    Estimate,
    SinrSums,
    estimate_from_sums,
    rayleigh_conditional,
    sample_geometry,
    sample_power_domain,
)
from tokenweave_ops.token_split import (
    H100,
    HardwareProfile,
    LinkModel,
    ModelShape,
    SplitOverride,
    SplitPlan,
    WeavePass,
    cpu_profile,
    gemm_us,
    load_overrides,
    plan_gemm_split,
    plan_token_split,
    published_split,
    weave_pass,
)

_library.load_libraries()

__version__ = "0.1.0"

__all__ = [
    "H100",
    "POLICIES",
    "CommunicationError",
    "CommunicationTimeout",
    "ConditionalSums",
    "DecodeRequests",
    "DecodeStep",
    "EmulatedLink",
    "Estimate",
    "GeometryTable",
    "HalfBatch",
    "HardwareProfile",
    "LinkModel",
    "LogTable",
    "ModelShape",
    "PeerLost",
    "PowerTable",
    "RankDisagreement",
    "RowScan",
    "SinrGrid",
    "SinrSums",
    "SplitOverride",
    "SplitPlan",
    "TwoSidedTable",
    "WeavePass",
    "Workspace",
    "__version__",
    "add_rms_norm_",
    "add_rms_norm_train",
    "allreduce",
    "allreduce_",
    "allreduce_rmsnorm",
    "allreduce_rmsnorm_",
    "confidence_scan",
    "cpu_profile",
    "decode_step_",
    "estimate_from_sums",
    "gather_residual_",
    "gemm_us",
    "load_overrides",
    "mark_table",
    "plan_gemm_split",
    "plan_token_split",
    "published_split",
    "rayleigh_conditional",
    "rms_norm",
    "rms_norm_train",
    "sample_geometry",
    "sample_power_domain",
    "select_and_commit_",
    "split_batch",
    "weave_pass",
]
