# PYTHON       interpreter to build .venv with (3.11 or newer)
# TORCH_INDEX  package index to take torch from, e.g. https://download.pytorch.org/whl/cpu for
#              the small CPU build; every other package comes from PyPI
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt

.DELETE_ON_ERROR:
.PHONY: demo test lint clean

demo: .venv/demo
	$(BIN)/zipc compile minilm --target cpu --speedup 2x --data examples/stsb -o out/minilm-2x

test: .venv/dev
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadgroup -m "not gpu and not ssh and not slow" \
		--hypothesis-profile=ci

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "zipc needs Python 3.11 or newer; run: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

.venv/demo: .venv/torch pyproject.toml
	$(PIP) -e '.[demo]'
	@touch $@

.venv/dev: .venv/demo
	$(PIP) -e '.[demo,dev,openvino,tensorrt-rtx]'
	@touch $@
