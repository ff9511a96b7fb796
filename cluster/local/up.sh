#!/usr/bin/env bash
# Start a Ray cluster on this machine for `python -m jobs.submit`: dashboard and Jobs API on
# 127.0.0.1:${MEDMM_PORT:-8265}. It is one node, or with MEDMM_WORKERS=2 a head that runs no work and two nodes that do.
# Everything listens on loopback, and Ray asks for a token there too: other users of the machine reach loopback, and a
# replica of Serve listens on every address. Jobs run with the project's own python, and find the token by themselves.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cluster.env"

how_to_submit() {
  echo "a shell that submits jobs needs: export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token"
}

if pid=$(head_pid); then
  echo "already up: $address (process $pid)"
  how_to_submit
  exit 0
fi
[ -x "$venv/bin/ray" ] || { echo "no Ray in $venv: run 'make env' first, or name another environment in MEDMM_VENV" >&2; exit 1; }
if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
  echo "port $port is taken by another program: choose a free one, MEDMM_PORT=8365 $0" >&2
  exit 1
fi

rm -rf "$state" # what a head that was killed left
mkdir -m 700 "$state"
(umask 077 && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$token")
export PATH="$venv/bin:$PATH"            # a job's `python` is looked up here
export RAY_USAGE_STATS_ENABLED=0
export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=medmm_ray.service.proxy:middlewares # errors of the proxy as problems
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0  # badly named: it makes Ray keep to 127.0.0.1 on Linux too
unset RAY_ADDRESS
# More logical CPUs than cores: a pipeline's actor stages at one CPU each would wait for each other for ever on two.
cpus=${MEDMM_CPUS:-8}
workers=${MEDMM_WORKERS:-0}
object_store=${MEDMM_OBJECT_STORE_BYTES:-1073741824}
setsid nohup ray start --head --block --node-ip-address=127.0.0.1 --num-cpus=$((workers ? 0 : cpus)) \
  --port=$((port + 1)) --dashboard-host=127.0.0.1 --dashboard-port="$port" --dashboard-agent-listen-port=$((port + 2)) \
  --ray-client-server-port=$((port + 3)) --min-worker-port=0 --max-worker-port=0 --object-store-memory="$object_store" \
  --temp-dir="$state/ray" --disable-usage-stats >"$state/head.log" 2>&1 </dev/null &
echo $! >"$state/pid"

has_head() {
  # The header comes from standard input: a command line can be read by every user.
  printf 'header = "Authorization: Bearer %s"' "$(<"$token")" |
    curl --config - -fsS --noproxy '*' -o /dev/null "$address/api/jobs/" 2>/dev/null
}

# One after the other: on a busy machine those that start at a time miss the half minute that Ray gives each. Each node
# has a folder of its own, where it unpacks what is uploaded, but for logs: a driver's is written to the head's path.
start_worker() {
  local session
  session=$(basename "$(readlink "$state/ray/session_latest")")
  mkdir -p "$state/ray-$1/$session"
  ln -sfn "$state/ray/$session/logs" "$state/ray-$1/$session/logs"
  setsid nohup python "$root/cluster/local/worker.py" start --block --address="127.0.0.1:$((port + 1))" \
    --node-ip-address=127.0.0.1 --num-cpus="$cpus" --min-worker-port=0 --max-worker-port=0 --include-log-monitor=false \
    --dashboard-agent-listen-port=0 --object-store-memory="$object_store" --temp-dir="$state/ray-$1" --disable-usage-stats \
    >"$state/worker-$1.log" 2>&1 </dev/null &
  echo $! >"$state/worker-$1.pid"
  while kill -0 $! 2>/dev/null; do
    grep -q 'Ray runtime started' "$state/worker-$1.log" && return 0
    sleep 0.2
  done
  return 1
}

start_workers() {
  local number
  for number in $(seq "$workers"); do
    start_worker "$number" || start_worker "$number" || return 1
  done
}

for _ in $(seq 120); do
  if has_head; then
    start_workers || break
    echo "up: $address"
    how_to_submit
    exit 0
  fi
  head_pid >/dev/null || sleep 1 # it may not have set its command line yet
  head_pid >/dev/null || break
  sleep 0.5
done
echo "Ray did not start; the end of its logs in $state:" >&2
tail -n 20 "$state"/*.log >&2
"$(dirname "${BASH_SOURCE[0]}")/down.sh" >&2
exit 1
