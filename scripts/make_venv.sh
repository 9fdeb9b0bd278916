#!/usr/bin/env bash
# make_venv.sh PYTHON VENV REQUIREMENTS: a virtual environment with these requirements, made or brought up to date.
set -eu
python=$1 venv=$2 requirements=$3
here=$(dirname "$0")

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "error: $python is missing or older than Python 3.10: name another, as in \`make PYTHON=python3.12 test\`."
  exit 1
fi
if [ ! -x "$venv/bin/pip" ]; then
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "error: $python cannot make virtual environments: install its venv module, \`apt install python$version-venv\` on Debian and Ubuntu."
    exit 1
  fi
  bash "$here/step.sh" "making $venv with $("$python" --version)" "$python" -m venv --clear "$venv"
fi
bash "$here/step.sh" "installing $requirements into $venv (torch with CUDA is a download of 2 to 3 GB)" \
  "$venv/bin/pip" install --progress-bar off -r "$requirements"
