# The commands a newcomer types: `make sweep` and `make test`, or `make test-fast`.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python

.PHONY: sweep test test-fast drill lint constraints clean

sweep: $(VENV)/.installed
	$(RUN) -m orchestrator.sweep $(ARGS)

# A test of Ray or of several workers is several processes already. The others have one thread each, so two run at a time.
FAST := -n 2 --dist loadfile -m 'not gpu and not ray and not workers'

# All tests on a CPU; with ARGS, the ones that they select.
test: $(VENV)/.installed
ifdef ARGS
	$(RUN) -m pytest $(ARGS)
else
	@status=0; \
	$(RUN) -m pytest $(FAST) || status=$$?; \
	$(RUN) -m pytest -m '(ray or workers) and not gpu' || status=$$?; \
	exit $$status
endif

# The tests that start neither Ray nor several workers.
test-fast: $(VENV)/.installed
	$(RUN) -m pytest $(FAST) $(ARGS)

# Real kills and outages, about an hour: before a release. Its table goes into docs/faults.md.
drill: $(VENV)/.installed
	$(RUN) -m tests.drill $(ARGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

# Pins every dependency for Python 3.11 to 3.13 (constraints.txt is this command's output). Wants an environment that is
# there, but does not renew it: without the pins that it is about to write, pip may not find a solution.
constraints:
	$(VENV)/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	  --no-emit-index-url --no-annotate --custom-compile-command "make constraints" -o constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit(f"longspan needs Python 3.11 to 3.13, but $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
