# Every target sets up what it needs; see scripts/bootstrap.sh.
PY := .venv/bin/python

.PHONY: demo serve test lint setup dev train eval-tiny clean

demo: setup        ## serve the bundled model with SkipKV and show what it saved against full KV
	@$(PY) -m benchmarks.demo

serve: setup       ## keep the demo server running on port 8000
	@$(PY) -m benchmarks.demo --keep

test: dev          ## run all tests
	@$(PY) -m pytest

lint: dev          ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

eval-tiny: dev     ## accuracy, length and memory of every policy on the bundled model; writes docs/results*
	@$(PY) -m benchmarks.accuracy tiny

train: dev         ## train the bundled model again (about an hour on one core)
	@$(PY) -m benchmarks.tiny_reasoner.train

setup:
	@scripts/bootstrap.sh

dev:
	@scripts/bootstrap.sh dev

clean:             ## remove the environment and everything that was built
	rm -rf .venv build *.egg-info
