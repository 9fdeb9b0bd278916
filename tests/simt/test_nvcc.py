"""The emulator's test kernels are kernels: nvcc compiles them for sm_90, so core/arch.cuh stays valid on both sides."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTANTIATIONS = """
#include "barriers.cuh"
#include "multimem.cuh"
#include "signals.cuh"
#include "vocabulary.cuh"
namespace tokenweave::TOKENWEAVE_BACKEND::test_kernels {
template __global__ void copy_packs<bf16>(const bf16*, bf16*, float*, int64_t);
template __global__ void copy_packs<fp16>(const fp16*, fp16*, float*, int64_t);
template __global__ void copy_packs<float>(const float*, float*, float*, int64_t);
template __global__ void widen<bf16>(const bf16*, float*, int64_t);
template __global__ void widen<fp16>(const fp16*, float*, int64_t);
template __global__ void narrow<bf16>(const float*, bf16*, int64_t);
template __global__ void narrow<fp16>(const float*, fp16*, int64_t);
template __global__ void load_add<bf16>(const Vec16*, Vec16*);
template __global__ void load_add<fp16>(const Vec16*, Vec16*);
template __global__ void load_add<float>(const Vec16*, Vec16*);
template __global__ void memory_ops<uint32_t>(uint32_t*, const int32_t*, const int32_t*, const uint32_t*,
                                              const uint32_t*, uint32_t*, int32_t, bool);
template __global__ void memory_ops<uint64_t>(uint64_t*, const int32_t*, const int32_t*, const uint64_t*,
                                              const uint64_t*, uint64_t*, int32_t, bool);
}
"""


@pytest.mark.no_launch
def test_kernels_compile_for_hopper(tmp_path):
    cuda_home = os.environ.get("CUDA_HOME")
    nvcc = (shutil.which(f"{cuda_home}/bin/nvcc") if cuda_home else None) or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on this machine")
    source = tmp_path / "kernels.cu"
    source.write_text(INSTANTIATIONS)
    command = [nvcc, "-std=c++20", "-arch=sm_90", "-cubin", "-Werror", "all-warnings", "--expt-relaxed-constexpr"]
    command += ["-DTOKENWEAVE_BACKEND=backend_cuda", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/simt/kernels'}"]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer's runtime
    result = subprocess.run([*command, source, "-o", tmp_path / "kernels.cubin"], capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr.decode()
