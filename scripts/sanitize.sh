#!/usr/bin/env bash
# sanitize.sh PYTHON: builds the emulator, the emulated kernels and the CPU kernels with ASan and UBSan into a directory
# of their own, and runs the emulator's tests and every family's numerics and contract tests on the emulated kernels.
set -eu
python=$1
export TOKENWEAVE_SANITIZE=address,undefined TOKENWEAVE_TEST_BUILD=1 TOKENWEAVE_CUDA=0
export TOKENWEAVE_LIBRARY_DIR=$PWD/build/sanitized

echo "==> building with $TOKENWEAVE_SANITIZE"
"$python" build_support.py --output "$TOKENWEAVE_LIBRARY_DIR"

# The interpreter itself is not instrumented, so the runtimes must be there before it. Leaks: CPython's own are many.
# A report goes to a file, since pytest captures what the process prints and dies with it.
compiler=${CXX:-c++}
runtimes="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
report=$TOKENWEAVE_LIBRARY_DIR/report
rm -f "$report".*
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:log_path=$report
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:log_path=$report
echo "==> running the emulated tests"
status=0
LD_PRELOAD=$runtimes "$python" -m pytest --backend simt -q tests/simt tests/*/test_*numerics.py tests/*/test_*contract.py ||
  status=$?
cat "$report".* 2>/dev/null || true
exit "$status"
