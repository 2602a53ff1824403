#!/usr/bin/env bash
# From a fresh clone to a tested one: environment, installation, ruff, mypy, pytest and, where it can run, the RDMA test
# in a virtual machine with a Soft-RoCE device. Arguments go to pytest and then replace the whole run:
#
#   bash scripts/test.sh                     everything that this machine can run
#   bash scripts/test.sh tests/router -q     one room
#
# VENV is where the environment goes (default: .venv in the clone). Everything is run whatever fails before it; the exit
# status is pytest's, or 1 if only something else failed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=${VENV:-$root/.venv}
bash scripts/venv.sh "$venv" test
export PATH="$venv/bin:$PATH"
# What is tested is this tree, in every process that a test starts; the extension comes from the wheel that was just built.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
built=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/vllm_loraserve/_lib
if [ -d "$built" ]; then rm -rf vllm_loraserve/_lib && cp -r "$built" vllm_loraserve/_lib; fi
if [ $# -gt 0 ]; then exec python -m pytest "$@"; fi

# Each step is noted, and what failed is said again at the end: where only the end of a log is kept, it must be there.
status=0
verdicts=()
step() { # NAME COMMAND...
  local name=$1 code=0 began=$SECONDS
  shift
  "$@" || code=$?
  local took="$((SECONDS - began)) s"
  if [ "$code" = 0 ]; then verdicts+=("ok      $name, $took"); else verdicts+=("FAILED  $name (status $code), $took"); fi
  return "$code"
}

step "ruff check" ruff check . || status=1
step "ruff format" ruff format --check . || status=1
step mypy mypy || status=1

# Tests of devices that are not here are left out by name, so that pytest counts them as deselected and never as passed.
absent=()
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || absent+=("not gpu")
ls /sys/class/infiniband/* >/dev/null 2>&1 || absent+=("not rdma")
marks=$(printf '%s and ' "${absent[@]}")
report=$(mktemp)
trap 'rm -f "$report"' EXIT
step pytest python -m pytest --durations=25 --junitxml="$report" -m "${marks% and }" || status=$?

# RDMA in two small virtual machines: Debian, and root for the packages it needs.
if [ "$(id -u)" = 0 ] && [ "$(. /etc/os-release && echo "$ID")" = debian ]; then
  apt-get update -qq || true # offline, what is installed may do; the step itself says what is missing
  step "RDMA in virtual machines" bash tests/rdma_vm/run.sh || [ "$status" != 0 ] || status=1
else
  verdicts+=("NOT RUN RDMA in virtual machines: needs Debian and root")
fi
while IFS= read -r line; do verdicts+=("$line"); done < <(python scripts/not_run.py)

echo "== what failed"
python scripts/failures.py "$report" || true
printf '%s\n' "${verdicts[@]}" "took    $SECONDS s in all, the environment included"
exit "$status"
