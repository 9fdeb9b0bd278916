#!/bin/sh
# compile_cuda.sh LOG OBJECT NVCC ARGUMENTS...: runs nvcc, keeps what it and ptxas report in LOG, shows it on failure.
log=$1
object=$2
shift 2
mkdir -p "$(dirname "$log")" "$(dirname "$object")"
"$@" >"$log" 2>&1 && exit 0
status=$?
cat "$log" >&2
exit "$status"
