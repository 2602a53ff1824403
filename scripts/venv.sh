#!/usr/bin/env bash
# Makes (or updates) a virtual environment with vllm-loraserve in it, for this machine: the `cuda` extra where there is
# an NVIDIA GPU, else the `cpu` extra with its install traps removed.
#
#   bash scripts/venv.sh DIR [EXTRA...]        for example: bash scripts/venv.sh .venv demo
#
# PYTHON chooses the interpreter (3.11 or newer), LORASERVE_DEVICE=cuda|cpu overrides the detection. Everything comes
# through plain pip and the indexes that pip is configured for.
set -euo pipefail

venv=${1:?usage: venv.sh DIR [EXTRA...]}
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
device=${LORASERVE_DEVICE:-}
if [ -z "$device" ]; then
  device=cpu
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then device=cuda; fi
fi
extras=$(IFS=,; echo "$device${*:+,$*}")

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "venv.sh: $("$python" --version 2>&1) is too old: set PYTHON to a Python 3.11 or newer" >&2
  exit 2
}

# Installing takes minutes; an environment that was made from the same files is taken as it is.
stamp=$(
  cd "$root"
  { echo "$extras"; find pyproject.toml README.md csrc vllm_loraserve -type f \
      -not -path '*/__pycache__/*' -not -path '*/_lib/*' -print0 | sort -z | xargs -0 cat; } | sha256sum | cut -c1-16
)
if [ -f "$venv/.loraserve-$stamp" ]; then exit 0; fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || {
  echo "venv.sh: can't make $venv; on Debian and Ubuntu: apt-get install python3-venv" >&2
  exit 1
}
quiet=(); [ -t 1 ] || quiet=(--quiet --progress-bar off)
echo "venv.sh: installing vllm-loraserve[$extras] into $venv (a few minutes the first time)"
"$venv/bin/python" -m pip install "${quiet[@]}" "$root[$extras]" || {
  if [ "$device" = cpu ]; then
    echo "venv.sh: if pip found no torch 2.13.0+cpu: let PIP_EXTRA_INDEX_URL name PyTorch's index of CPU wheels" >&2
  fi
  exit 1
}
[ "$device" = cuda ] || "$venv/bin/python" -m vllm_loraserve.launcher.fix_cpu
rm -f "$venv"/.loraserve-*
touch "$venv/.loraserve-$stamp"
