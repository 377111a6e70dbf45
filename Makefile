# Two commands for a newcomer: `make train` and `make test`. Everything else is spelt out below.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/vir_digits

.PHONY: train test lint docs lock clean

# Environment, data (shipped with scikit-learn), training, evaluation in every mode of retention.
train: $(VENV)/.installed
	$(BIN)/python train.py --config=configs/vir_digits.py --workdir=$(WORKDIR)
	$(BIN)/python eval.py --workdir=$(WORKDIR) --mode=all

test: $(VENV)/.installed-test
	# A file stays with one worker, in its order: what its tests share (a trained model, a compiled step) is made once.
	$(BIN)/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in site/; a warning is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { $(PYTHON) --version; echo "vir_jax needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

$(VENV)/.installed-docs: requirements-docs.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

# Writes the pinned requirements again from pyproject.toml; needs uv. Pins that still fit stay, but with UPGRADE=--upgrade.
LOCK := uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-emit-index-url \
  --no-emit-package vir-jax --custom-compile-command "make lock" pyproject.toml
RUN := --extra train --extra tfds
# Not those that hand over to a library of the user's choice, which would hold back the rest.
LOCKED := test inspect prepare compile compile-gpu docs
lock:
	sort -u requirements*.txt | grep -v '^#' > requirements-all.tmp
	$(LOCK) $(UPGRADE) $(RUN) $(LOCKED:%=--extra %) -o requirements-all.tmp
	$(LOCK) -c requirements-all.tmp $(RUN) -o requirements.txt
	for extra in $(LOCKED); do \
	  $(LOCK) -c requirements-all.tmp $(RUN) --extra $$extra -o requirements-$$extra.txt || exit 1; \
	done
	rm requirements-all.tmp

clean:
	rm -rf $(VENV) runs site
