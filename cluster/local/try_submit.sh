#!/usr/bin/env bash
# The way a cluster runs the pipeline, tried on this machine: submit, follow the log, read the result.
#   cluster/local/try_submit.sh [recipe] [name=value ...]
# The working folder is uploaded to the cluster (without what .gitignore and .rayignore name) and the job runs in the
# copy, which is deleted later: so `run=` must be an absolute path, or a URI, that outlives the job.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cluster.env"
recipe=${1:-jobs/recipes/tiny.yaml}
shift || true
run=${MEDMM_RUN:-$root/runs/$(basename "$recipe" .yaml)-submitted}

cd "$root"
"$venv/bin/ray" job submit --address "$address" --working-dir . -- \
  python -m jobs.pipeline "$recipe" "run=$run" "$@"
echo "the tables of the run:"
for manifest in "$run"/*/*/manifest.json; do
  "$venv/bin/python" - "$manifest" <<'PY'
import json, pathlib, sys
manifest = json.loads(pathlib.Path(sys.argv[1]).read_text())
print(f"  {manifest['name']:24} {manifest['rows']:>8,} rows  {manifest['seconds']:>8.1f} s")
PY
done
