# `make demo` and `make test` each make the environment that they need first, in .venv.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-all lint docs matrix

demo: .venv/demo
	$(BIN)/python examples/demo.py

# Parity, packing, streaming, extraction, conversion, loading, the command line and a training step.
test: .venv/installed
	$(PYTEST) -m "not slow and not pretrained and not corpus"

# And what takes long: other sizes, kills, examples, packaging, the site, the browser, training runs.
test-all: .venv/installed
	$(PYTEST) -m "not pretrained and not corpus"

docs: .venv/installed
	$(BIN)/mkdocs build --strict

# On Python 3.11 to 3.13, each with the oldest and the newest JAX.
matrix: .venv/installed
	$(BIN)/nox --noxfile tests/noxfile.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/demo: pyproject.toml
	@echo "Installing snax in .venv: half a minute, mostly JAX ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[metrics]'
	touch $@

.venv/installed: .venv/demo
	@echo "Installing what the tests need in .venv: a minute, mostly torch ..."
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
