#!/bin/bash
# run.sh [DIR]: boots Soft-RoCE machines and runs the RDMA tests in them: one machine, then two. For CI; under 3 minutes.
#
# Needs Debian 12 (root if packages are missing) and the extension built. PYTHON names the
# interpreter to test with (default: python3 on the PATH); it needs this package's dependencies and pytest. The last line
# is 'N passed, N failed'; a machine that reports nothing counts as one failure. A missing RDMA device is a failure.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
tree=$(cd "$here/../.." && pwd)
dir=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/vllm-loraserve/vm}
if ! "$here/prepare.sh" "$dir"; then
  echo "0 passed, 1 failed"
  exit 1
fi
PYTHON=$(command -v "${PYTHON:-python3}")
export PYTHON
# The tree under test first; then whatever the caller had.
export PYTHONPATH=$tree${PYTHONPATH:+:$PYTHONPATH}
cd "$tree" || exit 1
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
passed=0
failed=0

# Adds the counts of a pytest summary line in log $1, or one failure where there is none.
count() {
  local line p f e
  line=$(grep -E '^=+ .*(passed|failed|error).* in [0-9.]+' "$1" | tail -n 1)
  p=$(sed -n 's/.*[^0-9]\([0-9]\+\) passed.*/\1/p' <<< "$line")
  f=$(sed -n 's/.*[^0-9]\([0-9]\+\) failed.*/\1/p' <<< "$line")
  e=$(sed -n 's/.*[^0-9]\([0-9]\+\) error.*/\1/p' <<< "$line")
  passed=$((passed + ${p:-0}))
  failed=$((failed + ${f:-0} + ${e:-0}))
  if [ -z "$line" ] || { [ "$2" -ne 0 ] && [ $((${f:-0} + ${e:-0})) -eq 0 ]; }; then
    echo "run: $1 ended with status $2 and no result"
    failed=$((failed + 1))
  fi
}

if [ "${ONLY:-}" != two ]; then
  echo "== one machine"
  "$here/boot.sh" "$dir" "$here/guest/one.sh" | tee "$logs/one" | sed -u 's/^/one| /'
  count "$logs/one" "${PIPESTATUS[0]}"
fi

if [ "${ONLY:-}" != one ]; then
  echo "== two machines"
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  card=virtio-net-pci,netdev=wire,mac=52:54:00:00:00:1
  NODE=0 MEMORY=768 CPUS=1 setsid "$here/boot.sh" "$dir" "$here/guest/holder.sh" \
    -netdev socket,id=wire,listen="127.0.0.1:$port" -device "${card}0" > "$logs/holder" 2>&1 &
  holder=$!
  # Until node 0 listens on the wire; to connect would take the wire's one place.
  for _ in $(seq 600); do
    grep -q "0100007F:$(printf %04X "$port") 00000000:0000 0A" /proc/net/tcp && break
    sleep 0.1
  done
  NODE=1 MEMORY=1024 CPUS=1 "$here/boot.sh" "$dir" "$here/guest/reader.sh" \
    -netdev socket,id=wire,connect="127.0.0.1:$port" -device "${card}1" | tee "$logs/reader" |
    while IFS= read -r line; do
      echo "two| $line"
      # The last test asks for the other machine to be switched off in the middle of a read.
      if [[ $line == *SWITCH-OFF-NODE-0* ]]; then kill -KILL -- "-$holder"; fi
    done
  count "$logs/reader" "${PIPESTATUS[0]}"
  if kill -KILL -- "-$holder" 2>/dev/null; then echo "run: node 0 was still up at the end"; fi
  wait "$holder" 2>/dev/null
  sed 's/^/node 0: /' "$logs/holder" | tail -n 5
fi

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
