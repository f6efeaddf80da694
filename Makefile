# Everything a newcomer needs: each target prepares its own virtual environment.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test run lint soak fuzz tables clean

demo: .venv/.ready
	$(BIN)/lucent-relay demo

test: .venv/.ready
	$(BIN)/pytest

run: .venv/.ready
	$(BIN)/lucent-relay run --config config/relay.toml

# Sessions among faults of every kind, SECONDS long, with a plot of what could grow.
soak: SECONDS ?= 3600
SEED ?= 1
soak: .venv/.ready
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	mkdir -p bench/results
	$(BIN)/python -m tests.soak --seconds $(SECONDS) --seed $(SEED) --plot bench/results/soak.png

# Whatever bytes a stranger may send, SECONDS for each of the places where they are read.
fuzz: SECONDS ?= 60
fuzz: .venv/.ready
	$(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

lint: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Writes the options, commands and exit codes into README.md and config/relay.toml, from the code.
tables: .venv/.ready
	$(BIN)/python -m tests.repo.tables

.venv/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lucent-relay needs Python 3.11 or newer; set PYTHON=python3.x")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	touch $@

clean:
	rm -rf .venv dist
