# Two commands do everything: `make demo` and `make test`. Both make the environment first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs matrix

demo: .venv/installed
	$(BIN)/python examples/demo.py

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

docs: .venv/installed
	$(BIN)/mkdocs build --strict

# On Python 3.11 to 3.13, each with the oldest and the newest JAX.
matrix: .venv/installed
	$(BIN)/nox --noxfile tests/noxfile.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml
	@echo "Making the environment in .venv: a minute or two, mostly JAX and torch ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
