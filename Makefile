# `make demo` and `make test` need Python 3.11 or newer and nothing else; `make setup` is what both do first.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint serve clean

setup: $(STAMP)

$(STAMP): requirements-cpu.lock pyproject.toml scripts/setup.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" sh scripts/setup.sh
	@touch $@

demo: setup
	$(BIN)/steer demo $(ARGS)

serve: setup
	$(BIN)/steer serve $(MODEL) $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint
	sh scripts/browser.sh
	$(BIN)/python -m pytest $(ARGS)

clean:
	rm -rf $(VENV) report build
