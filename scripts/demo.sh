#!/usr/bin/env bash
# From a fresh clone to a working cluster: environment, installation, then `vllm-loraserve demo` with this script's
# arguments. VENV is where the environment goes (default: .venv in the clone).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
bash "$root/scripts/venv.sh" "$venv" demo
exec "$venv/bin/vllm-loraserve" demo "$@"
