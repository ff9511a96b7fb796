#!/usr/bin/env bash
# Stop the Ray head that up.sh started on this port, and no other: `ray stop` would end every Ray on the machine.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cluster.env"

if pid=$(head_pid); then
  kill -TERM "$pid" # `ray start --block` ends its own processes
  for _ in $(seq 60); do
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.5
  done
  kill -KILL -- "-$pid" 2>/dev/null || true # the rest of its session, if it hangs
  echo "down: $address"
else
  echo "not up: $address"
fi
rm -rf "$state"
