#!/usr/bin/env bash
# step.sh MESSAGE COMMAND...: one line per step with its time; what the command prints is shown only if it fails.
set -u
message=$1
shift
log=$(mktemp)
trap 'rm -f "$log"' EXIT
start=$SECONDS
echo "==> $message"
"$@" >"$log" 2>&1 &
job=$!
while sleep 1 && kill -0 "$job" 2>/dev/null; do
  elapsed=$((SECONDS - start))
  if [ $((elapsed % 20)) -eq 0 ]; then echo "    still at it, $elapsed s"; fi
done
wait "$job"
status=$?
if [ "$status" -ne 0 ]; then
  cat "$log"
  echo "    failed after $((SECONDS - start)) s (exit $status): $*"
  exit "$status"
fi
echo "    done in $((SECONDS - start)) s"
