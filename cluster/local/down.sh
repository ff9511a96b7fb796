#!/usr/bin/env bash
# Stop the cluster that up.sh started on this port, and no other: `ray stop` would end every Ray on the machine.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cluster.env"

# `ray start --block` ends its own processes; the rest of its session is killed if it hangs.
stop() {
  kill -TERM "$1" 2>/dev/null || return 0
  for _ in $(seq 60); do
    kill -0 "$1" 2>/dev/null || break
    sleep 0.5
  done
  kill -KILL -- "-$1" 2>/dev/null || true
}

for pid in $(worker_pids); do stop "$pid" & done
wait
if pid=$(head_pid); then
  stop "$pid"
  echo "down: $address"
else
  echo "not up: $address"
fi
rm -rf "$state"
