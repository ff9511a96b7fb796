.DEFAULT_GOAL := help
.PHONY: help env quickstart test coverage test-fast check lint-cluster locks format chaos serve cluster-up cluster-down clean
PY := .venv/bin/python
RUN ?= runs/quickstart
# In the order of tests/conftest.py, not by the number of tests; without the last words xdist waits for ever for a process
# that has crashed.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

env:  ## build .venv (once; everything below does it by itself)
	@cluster/local/setup.sh

quickstart: env  ## the whole pipeline on phantoms, the report, one served query (15 to 22 min on 2 cores)
	@$(PY) -m jobs.pipeline jobs/recipes/quickstart.yaml run=$(RUN)
	@$(PY) -m jobs.query jobs/recipes/quickstart.yaml run=$(RUN)

test: env  ## all tests, real engines included
	@$(PY) -m pytest $(PARALLEL) -m "not chaos and not gpu"

coverage: env  ## the same with line coverage, some minutes longer
	@$(PY) -m pytest $(PARALLEL) -m "not chaos and not gpu" --cov --cov-report=term

test-fast: env  ## the tests without engines (2-3 minutes)
	@$(PY) -m pytest $(PARALLEL) -m "not engine and not chaos and not gpu"

check: env lint-cluster  ## ruff (format, lint), mypy --strict, how dense the code is, and whether the locks of both kinds are right (asks the package index)
	@$(PY) -m ruff format --check . && $(PY) -m ruff check . && $(PY) -m mypy && $(PY) .ci/density.py && $(PY) cluster/local/locks.py

lint-cluster: env  ## the files in cluster/ by their schemas and by the rules of docs/cluster.md; no network
	@$(PY) -m cluster.lint

locks: env  ## write the locks of both kinds anew after a change of pyproject.toml's packages
	@$(PY) cluster/local/locks.py --update

format: env  ## ruff's formatting and safe fixes
	@$(PY) -m ruff format . && $(PY) -m ruff check --fix .

chaos: env  ## faults injected into all steps on scripted engines, on one machine and on three nodes, then the pipeline on real ones: killed, its tables are the same
	@$(PY) -m pytest -m chaos -s

serve: env  ## the scorer on http://127.0.0.1:8000 (OpenAPI page at /docs)
	@$(PY) -m jobs.serve jobs/recipes/quickstart.yaml run=$(RUN)

cluster-up: env  ## a local Ray cluster for `python -m jobs.submit`, on 127.0.0.1; prints how a shell shows it its token
	@cluster/local/up.sh

cluster-down:  ## stop that cluster, and nothing else
	@cluster/local/down.sh

clean:  ## remove caches and build output (not .venv, not runs/)
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* && find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
