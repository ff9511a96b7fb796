#!/usr/bin/env bash
# Writes what an environment holds, with versions and licences, as CycloneDX. Usage: cluster/local/sbom.sh PYTHON FILE
set -euo pipefail
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"$1" -m venv "$tools"
"$tools/bin/python" -m pip --quiet --disable-pip-version-check install --no-cache-dir cyclonedx-bom==7.5.0
"$tools/bin/cyclonedx-py" environment "$1" --output-format JSON --output-file "$2"
