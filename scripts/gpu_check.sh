#!/usr/bin/env bash
# gpu_check.sh: everything that needs a GPU, without network and without a virtual environment, with the python3 that
# holds torch and pytest. Goes on after a failure; ends with a table, and non-zero if a step failed.
# Environment: PYTHON (python3), RESULTS (bench/results), and those of build_support.py.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${RESULTS:-bench/results}
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}

if ! gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>&1); then
  echo "error: no GPU that $python's torch can use: ${gpu##*$'\n'}"
  exit 1
fi
device=$(echo "$gpu" | tr '[:upper:] ' '[:lower:]-' | tr -cd 'a-z0-9-')
echo "GPU: $gpu, results go to $results/$device"

table=
failed=0
step() {  # step NAME COMMAND...
  local name=$1 start=$SECONDS state=ok
  shift
  echo
  echo "==> $name"
  "$@" || { state="FAILED (exit $?)"; failed=1; }
  table+=$(printf '%-28s %6s s  %s' "$name" $((SECONDS - start)) "$state")$'\n'
}
skip() {
  echo
  echo "==> $1: skipped, $2"
  table+=$(printf '%-28s %6s s  skipped: %s' "$1" 0 "$2")$'\n'
}
cuda_loads() { "$python" -c 'import sys; from tokenweave_ops import testing; sys.exit(testing.cuda_unavailable_reason())'; }

# Built here if the tools are here; else libraries that were carried along serve, if they load: the stable ABI lets them
# run under another torch and Python than they were built with.
if missing=$("$python" -c 'import os, build_support as b; b.find_tool("cmake"); b.find_tool("ninja"); b.decide_cuda("1", b.find_nvcc(os.environ, []), b.find_torch())' 2>&1); then
  if "$python" -c 'import sysconfig, pathlib, build_support as b; b.check_test_build(pathlib.Path(sysconfig.get_path("include")))' 2>/dev/null; then
    export TOKENWEAVE_TEST_BUILD=1  # with line numbers for compute-sanitizer
  else
    export TOKENWEAVE_TEST_BUILD=0
  fi
  step build env TOKENWEAVE_CUDA=1 "$python" build_support.py
else
  skip build "${missing##*$'\n'}"
fi
step "CUDA kernels load" cuda_loads
step info "$python" -m tokenweave_ops.info
step "tests on cuda" "$python" -m pytest --backend cuda -q tests/*/test_*numerics.py tests/*/test_*contract.py \
  tests/*/test_*compile.py tests/*/test_*errors.py tests/*/test_laws.py

step "models on cuda" "$python" -m pytest -q tests/models/tokenweave/test_streams.py tests/models/tokenweave/test_model.py \
  tests/models/localleap/test_model.py tests/models/localleap/test_cache.py tests/models/localleap/test_generate.py

# Every family's contract tests (its odd sizes, strides and alignments) under each tool. Without torch's caching
# allocator every tensor has bounds of its own (graph capture needs that allocator). initcheck must see every kernel, as each may be what initialised a word.
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
for tool in memcheck racecheck synccheck initcheck; do
  if [ ! -x "$sanitizer" ]; then
    skip "$tool" "no compute-sanitizer on PATH or in CUDA_HOME"
    continue
  fi
  options=(--kernel-name kernel_substring=backend_cuda)
  [ "$tool" = initcheck ] && options=()
  [ "$tool" = memcheck ] && options+=(--report-api-errors no)  # torch probes the driver with calls that may fail
  # Deadlines are longer by the factor that kernels are slower.
  step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 TOKENWEAVE_TIMEOUT_SCALE=20 timeout 600 "$sanitizer" --tool "$tool" --error-exitcode 7 \
    "${options[@]}" "$python" -m pytest --backend cuda -q -x -p no:cacheprovider -k "not graph" tests/*/test_*contract.py
done

mkdir -p "$results/$device"
for family in $(grep -l '^def cases(' bench/*.py); do
  name=$(basename "$family" .py)
  step "bench $name" "$python" bench/run.py --device cuda --family "$name" --json "$results/$device/$name.json"
done

# Exact laws against simulation on the GPU, a million realisations each.
step "densification verify" "$python" -m tokenweave_models.cli densification verify --device cuda

# A block of a diffusion language model: eight layers of LLaDA-8B, model and selector apart, beside the published selector.
for extra in "" --cuda-graph; do
  step "localleap bench ${extra#--}" "$python" -m tokenweave_models.cli localleap bench --device cuda --preset llada-8b --layers 8 \
    --hidden 0 --dtype bf16 --policies local_leap,topk --caches dual --prompt-length 256 --gen-length 128 $extra \
    --json "$results/$device/localleap/bench${extra:+_graph}.json"
done

# Token splitting on one GPU: planned with the wave model, then with what this GPU was measured to do. In a folder of its
# own, since bench/report.py renders what lies beside the families' files.
split=$results/$device/token_split
step "bench split tax" "$python" bench/split_tax.py --device cuda --json "$split/split_tax.json"
step calibrate "$python" -m tokenweave_models.cli calibrate --device cuda --output "$split/profile.json"
step "split tax, calibrated" "$python" bench/split_tax.py --device cuda --part tax --profile "$split/profile.json" \
  --json "$split/split_tax_calibrated.json"

# A prefill of eight layers of Llama-3.3-70B: over all GPUs of this machine, or on one with one rank's MLP of eight, where
# there is nothing to sum and half and half shows what splitting alone costs.
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
shape=(--random --hidden 8192 --layers 8 --tokens 1024 2048 4096 8192)
if [ "$gpus" -gt 1 ]; then
  shape+=(--intermediate 28672 --heads 64 --kv-heads 8)
else
  shape+=(--intermediate 3584 --heads 64 --kv-heads 8 --split half)
fi
for launch in eager graph; do
  step "prefill, $launch" "$python" -m torch.distributed.run --standalone --nproc-per-node="$gpus" \
    -m tokenweave_models.tokenweave prefill-bench "${shape[@]}" --launch "$launch" \
    --json "$split/prefill_$launch.json" --png "$split/prefill_$launch.png"
done

echo
echo "$gpu"
printf '%s' "$table"
exit "$failed"
