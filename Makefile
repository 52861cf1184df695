# make demo        creates .venv, installs vlmport, captions the example picture
# make test        installs everything that the tests need, then runs them
# make test-fast   the quick ones of every room, for the time between two edits: about 4 minutes on 2 cores
# make check       formatters, linter, type checkers, of Python and of web/; the documentation
# make docs        builds the documentation as a site, into site/
# make verify-all  every model, layout and precision against PyTorch, the tests that `make test`
#                  leaves out, then fuzzing: 20 to 40 minutes
#                  (FUZZ_MINUTES=4 of them; 0 leaves it out)
# make test-onnxruntime  the tests of graphs and models under the next ONNX Runtime
# make wheel       builds the wheel, the demo page inside
# make clean       removes what the others made
#
# PyTorch is needed by the tests only. On Linux its default build brings CUDA; to save gigabytes,
# set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# Node.js comes from PyPI with the other requirements, so that its version is known.
export PATH := $(CURDIR)/$(BIN):$(PATH)

FUZZ_MINUTES ?= 4

# What npm itself writes when it has installed what web/ needs.
NODE_MODULES := web/node_modules/.package-lock.json

.PHONY: demo test test-fast test-onnxruntime check docs verify-all wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	@$(BIN)/vlmport caption examples/red_square.png

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# Without the tests that are marked slow and the files that tests/balance.py lists as long.
test-fast: $(VENV)/installed-dev
	$(BIN)/python -m pytest --quiet --numprocesses auto --dist loadfile -m "not slow"

check: $(VENV)/installed-dev $(NODE_MODULES) docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m tests.errors_reference --check
	$(BIN)/python -m tests.cli_reference --check
	$(BIN)/python -m tests.manifest_reference --check
	cd web && npm run --silent check

# Warnings are errors (not with --quiet, which hides them from --strict). The variable hides a notice
# of the theme about MkDocs 2.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The same environment with another ONNX Runtime before it: the tests that run graphs, and the
# built-in models from export to answers.
NEXT_ONNXRUNTIME := 1.32.0
NEXT := .venv-onnxruntime-$(NEXT_ONNXRUNTIME)
NEXT_TESTS := tests/graph tests/families tests/test_shapes.py tests/test_shapes_qwen.py tests/test_shapes_smolvlm.py \
  tests/runtime/test_components.py tests/runtime/test_generate.py tests/runtime/test_probe.py

$(NEXT)/installed: | $(VENV)/installed-dev
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target $(NEXT) \
	  onnxruntime==$(NEXT_ONNXRUNTIME)
	@touch $@

test-onnxruntime: $(NEXT)/installed
	PYTHONPATH=$(CURDIR)/$(NEXT) $(BIN)/python -c \
	  'import onnxruntime as o; print("ONNX Runtime", o.__version__); assert o.__version__ == "$(NEXT_ONNXRUNTIME)"'
	PYTHONPATH=$(CURDIR)/$(NEXT) $(BIN)/python -m pytest --numprocesses auto --dist loadfile $(NEXT_TESTS)

verify-all: $(VENV)/installed-dev
	$(BIN)/python -m tests.verify_all --fuzz-minutes $(FUZZ_MINUTES)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 …'; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo 'No venv module: apt-get install python3-venv, then run it again'; exit 1; }

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing vlmport into $(VENV) …'
	@$(PIP) --quiet --editable .
	@touch $@

# torch first and alone, so that a CPU build that pip already knows of is taken.
$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	@echo 'Installing what the tests need: torch, transformers, pytest, Node.js …'
	@$(PIP) --progress-bar off torch
	@$(PIP) --quiet --editable '.[verify,eval,cider,grammar,serve]' --requirement requirements-dev.txt
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed requirements-docs.txt
	@echo 'Installing what the documentation needs: MkDocs …'
	@$(PIP) --quiet --requirement requirements-docs.txt
	@touch $@

$(NODE_MODULES): web/package.json web/package-lock.json | $(VENV)/installed-dev
	cd web && ONNXRUNTIME_NODE_INSTALL=skip npm ci --ignore-scripts --no-audit --no-fund
	@touch $@

wheel: $(VENV)/installed-dev $(NODE_MODULES)
	rm -rf dist
	cd web && npm run build
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls -lh dist/*.whl
	@test -z "$$(find dist -name '*.whl' -size +60000k)" || \
	  { echo 'The wheel is larger than 60 MB: is there more than one wasm variant in it?'; exit 1; }

clean:
	rm -rf $(VENV) .venv-app .venv-clients .venv-ray .venv-onnxruntime-* dist site
	rm -rf tests/transformers_js/node_modules tests/serve/clients_js/node_modules
	rm -rf web/node_modules web/dist web/browser/built src/vlmport/web_page
