#!/usr/bin/env bash
# gpu_check.sh: everything that needs a GPU, without network and without a virtual environment, with the python3 that
# holds torch and pytest. Goes on after a failure; ends with tables (scripts/gpu_table.py), and non-zero if a step failed.
# Environment: PYTHON (python3), RESULTS (bench/results), PARTS (all of "build tests sanitize bench systems"), REPORT
# (build/gpu-check), and those of build_support.py. Parts may be run one after another, each in a time that is at hand:
# what they leave in REPORT adds up.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${RESULTS:-bench/results}
parts=${PARTS:-build tests sanitize bench systems}
report=${REPORT:-build/gpu-check}
[ -n "${PARTS:-}" ] || rm -rf "$report"  # all of it: nothing of an earlier run is told again
mkdir -p "$report"
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}

if ! gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>&1); then
  echo "error: no GPU that $python's torch can use: ${gpu##*$'\n'}"
  exit 1
fi
device=$(echo "$gpu" | tr '[:upper:] ' '[:lower:]-' | tr -cd 'a-z0-9-')
echo "GPU: $gpu, results go to $results/$device"

record() { printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$report/steps.tsv"; }  # name, seconds, state
step() {  # step NAME COMMAND...
  local name=$1 start=$SECONDS state=ok
  shift
  echo
  echo "==> $name"
  "$@" || state="FAILED (exit $?)"
  record "$name" $((SECONDS - start)) "$state"
}
skip() {
  echo
  echo "==> $1: skipped, $2"
  record "$1" 0 "skipped: $2"
}
has() { [[ " $parts " == *" $1 "* ]]; }
logged() {  # logged FILE COMMAND...: what it prints goes there too
  local file=$1
  shift
  "$@" 2>&1 | tee "$file"
  return "${PIPESTATUS[0]}"
}
families=$(for path in tests/*/test_contract.py; do basename "$(dirname "$path")"; done)
cuda_loads() { "$python" -c 'import sys; from tokenweave_ops import testing; sys.exit(testing.cuda_unavailable_reason())'; }

# Built here if the tools are here; else libraries that were carried along serve, if they load: the stable ABI lets them
# run under another torch and Python than they were built with.
if has build; then
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
fi
step "CUDA kernels load" cuda_loads
step info "$python" -m tokenweave_ops.info

if has tests; then
  for family in $families; do
    files=$(find "tests/$family" -name 'test_*numerics.py' -o -name 'test_*contract.py' -o -name 'test_*compile.py' \
      -o -name 'test_*errors.py' -o -name 'test_laws.py' | grep "^tests/$family/[^/]*$" | sort)
    # shellcheck disable=SC2086  # one word a file
    step "tests $family" "$python" -m pytest --backend cuda -q --junitxml="$report/tests_$family.xml" $files
  done
  step "models on cuda" "$python" -m pytest -q tests/models/tokenweave/test_streams.py tests/models/tokenweave/test_model.py \
    tests/models/localleap/test_model.py tests/models/localleap/test_cache.py tests/models/localleap/test_generate.py
fi

# Every family's contract tests (its odd sizes, strides and alignments) under each tool. Without torch's caching
# allocator every tensor has bounds of its own (graph capture needs that allocator). initcheck must see every kernel, as
# each may be what initialised a word.
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if has sanitize; then
  for tool in memcheck racecheck synccheck initcheck; do
    if [ ! -x "$sanitizer" ]; then
      skip "$tool" "no compute-sanitizer on PATH or in CUDA_HOME"
      continue
    fi
    options=(--kernel-name kernel_substring=backend_cuda)
    [ "$tool" = initcheck ] && options=()
    [ "$tool" = memcheck ] && options+=(--report-api-errors no)  # torch probes the driver with calls that may fail
    for family in $families; do
      # Deadlines are longer by the factor that kernels are slower.
      step "$tool $family" logged "$report/${tool}_$family.log" \
        env PYTORCH_NO_CUDA_MEMORY_CACHING=1 TOKENWEAVE_TIMEOUT_SCALE=20 timeout 600 \
        "$sanitizer" --tool "$tool" --error-exitcode 7 "${options[@]}" \
        "$python" -m pytest --backend cuda -q -x -p no:cacheprovider -k "not graph" tests/"$family"/test_*contract.py
    done
  done
fi

mkdir -p "$results/$device"
if has bench; then
  for family in $(grep -l '^def cases(' bench/*.py); do
    name=$(basename "$family" .py)
    step "bench $name" "$python" bench/run.py --device cuda --family "$name" --json "$results/$device/$name.json"
  done
fi

if has systems; then
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
fi

echo
echo "$gpu"
exec "$python" scripts/gpu_table.py "$report" "$results/$device"
