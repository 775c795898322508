#!/usr/bin/env bash
# Makes .venv with everything to run, test and check; does nothing while its inputs are unchanged.
#
#   PYTHON         the interpreter to build on (default python3, 3.11 or newer)
#   UV_FIND_LINKS  a folder or page of local wheels; pip's own find-links setting is used without it
#
# A system Python that already has a CUDA torch keeps it: the environment then sees the system's
# packages and torch is left out of the installation.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/setup.stamp
inputs=$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum)
if [ -x .venv/bin/vpmoe ] && [ "$(cat "$stamp" 2>/dev/null)" = "$inputs" ]; then
  exit 0
fi

begin=$(date +%s)
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$python" --version) is too old" >&2
  echo "hint: set PYTHON to a Python 3.11 or newer" >&2
  exit 1
}

options=(-c constraints.txt -e '.[all,dev]')
has_cuda_torch='import sys, torch; sys.exit(torch.version.cuda is None)'
if "$python" -c "$has_cuda_torch" 2>/dev/null; then
  [ -d .venv ] || "$python" -m venv --system-site-packages .venv
  # uv does not look at system packages, so it is told that torch and triton are never wanted.
  printf '%s; sys_platform == "never"\n' torch triton > .venv/system-torch.txt
  options=(--overrides .venv/system-torch.txt "${options[@]}")
  echo "setup: keeping the system's CUDA torch"
else
  [ -d .venv ] || "$python" -m venv .venv
fi

.venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt uv
# uv does not read pip's settings; without the local wheels it would fetch a CUDA torch.
wheels=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)}}
UV_FIND_LINKS=${wheels//$'\n'/,} .venv/bin/uv pip install -q -p .venv "${options[@]}"

echo "$inputs" > "$stamp"
echo "setup: .venv is ready after $(($(date +%s) - begin)) s"
