# make demo   creates .venv, installs vlmport, captions the example picture
# make test   installs everything that the tests need, then runs all of them
# make check  formatter, linter, type checker
# make clean  removes what the others made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
NODE_TESTS := tests/transformers_js

.PHONY: demo test check clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	@$(BIN)/vlmport caption examples/red_square.png

test: $(VENV)/installed-dev $(NODE_TESTS)/node_modules/installed
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 …'; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo 'No venv module: apt-get install python3-venv, then run it again'; exit 1; }

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing vlmport into $(VENV) …'
	@$(PIP) --editable .
	@touch $@

# torch first and alone, so that a CPU build that pip already knows of is taken.
$(VENV)/installed-dev: $(VENV)/installed
	@echo 'Installing what the tests need: torch, transformers, pytest …'
	@$(PIP) torch
	@$(PIP) --editable '.[verify]' --requirement requirements-dev.txt
	@touch $@

$(NODE_TESTS)/node_modules/installed: $(NODE_TESTS)/package-lock.json
	@command -v npm >/dev/null || \
	  { echo 'Node.js 20 or newer is needed for the transformers.js test: https://nodejs.org'; exit 1; }
	@echo 'Installing transformers.js for its test …'
	@cd $(NODE_TESTS) && ONNXRUNTIME_NODE_INSTALL=skip npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@

clean:
	rm -rf $(VENV) $(NODE_TESTS)/node_modules
