# make demo    the appliance with its own broker and real pictures, on this terminal; options: make demo ARGS=--help
# make test    the tests; what is not on this machine (mosquitto, torch, a GPU) is skipped with its reason
# make check   before every commit: format, lint, types, tests
# make docs    write the generated pages of docs/
#
# Each makes the virtual environment it needs in .venv, once, and again when pyproject.toml changes.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Three workers for two cores: much of the suite waits for brokers and children. Each takes whole files, whose tests share
# what is dear.
PYTEST := $(BIN)/python -m pytest --numprocesses 3 --dist loadfile

.PHONY: demo test check docs
.SILENT:

demo: $(VENV)/ready-demo
	$(BIN)/appliance demo $(ARGS)

test: $(VENV)/ready-dev
	$(PYTEST) $(ARGS)

check: $(VENV)/ready-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(PYTEST) $(ARGS)

docs: $(VENV)/ready-dev
	$(BIN)/python docs/build.py

# The developer's environment holds everything that the demo needs, so it makes both ready.
$(VENV)/ready-demo: pyproject.toml | $(VENV)/bin/python
	echo "Installing the appliance into $(VENV) (once; a minute or two)"
	$(PIP) -e '.[broker]'
	touch $@

$(VENV)/ready-dev: pyproject.toml | $(VENV)/bin/python
	echo "Installing the appliance and its test tools into $(VENV) (once; a minute or two)"
	$(PIP) -e '.[dev]'
	touch $(VENV)/ready-demo $@

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or later is needed: apt-get install python3 python3-venv (or: make PYTHON=/path/to/python3)" >&2; \
		exit 1; }
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "Python's venv is needed: apt-get install python3-venv" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
