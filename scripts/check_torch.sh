#!/usr/bin/env bash
# check_torch.sh PYTHON VENV REQUIREMENTS: installs the package the way a user does, under another torch, and runs the
# CPU half of every family's tests and the packaging tests that need no build tree, from outside the source tree.
set -euo pipefail
python=$1 venv=$2 requirements=$3
here=$(dirname "$0")
export TOKENWEAVE_TEST_BUILD=0

if ! bash "$here/make_venv.sh" "$python" "$venv" "$requirements"; then
  echo "If pip found no such torch: PIP_EXTRA_INDEX_URL must name PyTorch's index of CPU wheels for a +cpu version."
  exit 1
fi
python=$PWD/$venv/bin/python
echo "==> installing tokenweave-ops (not editable, no test build)"
"$python" -m pip install -v --no-build-isolation --no-deps --force-reinstall . 2>&1 | grep -E '^ *(Building tokenweave|  *(torch|CPU|CUDA|jobs) |error|Built |Successfully)'

# A copy of the tests alone: beside the source tree, its package would be imported instead of the installed one.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r tests bench pyproject.toml "$copy"
cd "$copy"
"$python" -m tokenweave_ops.info
echo "==> running the CPU tests of the installed package"
"$python" -m pytest --backend cpu -q tests/*/test_*numerics.py tests/*/test_*contract.py \
  tests/*/test_*compile.py tests/*/test_*errors.py tests/*/test_processes.py tests/packaging/test_info.py tests/packaging/test_loading.py
