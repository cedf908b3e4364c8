# Everything a fresh machine needs: Python 3.11 or newer, make and a package index.
.PHONY: demo test lint format bench bench-quick clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

demo: $(STAMP)  ## make a synthetic corpus, pre-train on it, write demo/report.html
	$(BIN)/ctal demo --out demo

test: $(STAMP)  ## the invariants, in parallel
	$(BIN)/python -m pytest -n auto tests

lint: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(STAMP)  ## the measurements of docs/performance.md and docs/scaling.md: 25 minutes of an otherwise idle machine
	$(BIN)/python -m benchmarks

bench-quick: $(STAMP)  ## the same at tiny sizes, for its equality checks
	$(BIN)/python -m benchmarks --quick

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

# The constraints file keeps an extra from replacing torch by another build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $@
