#!/usr/bin/env bash
# From a fresh clone to a tested one: environment, installation, ruff, mypy, pytest and, where it can run, the RDMA test
# in a virtual machine with a Soft-RoCE device. Arguments go to pytest and then replace the whole run:
#
#   bash scripts/test.sh                     everything that this machine can run
#   bash scripts/test.sh tests/router -q     one room
#
# VENV is where the environment goes (default: .venv in the clone). The exit status is pytest's, if that is not 0.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=${VENV:-$root/.venv}
bash scripts/venv.sh "$venv" test
export PATH="$venv/bin:$PATH"
if [ $# -gt 0 ]; then exec python -m pytest "$@"; fi

ruff check .
ruff format --check .
mypy

# Tests of devices that are not here are left out by name, so that pytest counts them as deselected and never as passed.
absent=()
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || absent+=("not gpu")
ls /sys/class/infiniband/* >/dev/null 2>&1 || absent+=("not rdma")
marks=$(printf '%s and ' "${absent[@]}")
status=0
python -m pytest -m "${marks% and }" ${PYTEST_LOG:+--color=no} || status=$?
[ "$status" = 0 ] || exit "$status"
if [ -f tests/rdma_vm/run.sh ]; then bash tests/rdma_vm/run.sh; fi
