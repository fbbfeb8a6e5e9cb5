# make align   the main job on the embedded default: installs into .venv, aligns, leaves a run under outputs/
# make test    the test suite
# make check   lint, format, types, layering
# make clean   removes .venv, build/ and the caches; runs under outputs/ stay
#
# Variables: PYTHON (3.11 or newer), CONFIG and ARGS (for align: a preset or a YAML file, and overrides such as
# ARGS="--seed 1"; for test: ARGS are pytest's), WORKERS (processes of the test suite, one thread each), OUTPUT,
# TORCH_INDEX (an index with the torch build you want, such as the CPU one of download.pytorch.org; by default pip's
# own settings hold).

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= shapes
OUTPUT ?= outputs/$(basename $(notdir $(CONFIG)))
ARGS ?=
WORKERS ?= auto
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(wildcard kernels/host/csrc/* kernels/host/csrc/*/*)

.PHONY: align test check install dev clean
.DELETE_ON_ERROR:

align: install
	@folder="$(OUTPUT)"; n=1; \
	while [ -e "$$folder" ]; do n=$$((n + 1)); folder="$(OUTPUT)-$$n"; done; \
	echo "$(BIN)/leapalign align $(CONFIG) --output_dir $$folder $(ARGS)"; \
	$(BIN)/leapalign align $(CONFIG) --output_dir "$$folder" $(ARGS)

test: dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy $(wildcard leapalign bench tests)
	$(BIN)/python -m pytest -q tests/test_layering.py

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

# torch comes first, alone and pinned: what follows then finds it installed and fetches no other build of it.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"leapalign needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PIP) install -c constraints.txt -e .
	@touch $@

# Its own install covers the one above: one environment serves both.
$(VENV)/.installed-dev: $(VENV)/.torch $(SOURCES)
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
