# Every target makes .venv itself, when it is missing or when pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

FULL := $(VENV)/.installed-full
DEMO := $(VENV)/.installed-demo
PINS_TEST := tests/test_packaging.py::test_installed_versions_are_the_pinned_ones

comma := ,

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo lint test test-cluster test-gpu test-oldest test-newest bench bench-gpu docs docs-version diagram dist clean distclean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 21

demo: $(DEMO) ## what diamonds cost, by a network before and after ResMem: real data that ships with a package
	$(BIN)/python examples/diamonds.py

lint: $(FULL) ## lint, format check, types, and which way imports go
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint ## lint, then all tests, doctests and documented examples but those of test-cluster and test-gpu
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-cluster: $(FULL) ## Ray with several nodes, ranks and applications: shards, nodes and drivers die (about four minutes)
	$(BIN)/python -m pytest -m cluster --numprocesses 2 --dist loadfile --no-loadscope-reorder

# With $(PYTHON) as it is, where that has torch: nothing is installed beside a torch that was chosen for the card.
on-gpu = set -e; if $(PYTHON) -c "import torch, lightning$(1)" 2>/dev/null; then python=$(PYTHON); \
	else $(MAKE) $(FULL); python=$(BIN)/python; fi; PYTHONPATH=. $$python

test-gpu: ## the tests that take a GPU, with PYTHON=python3 as it is if it has torch and pytest (under two minutes)
	@$(call on-gpu,$(comma) pytest) -m pytest -o addopts= --import-mode=importlib -ra -m gpu tests/gpu

bench-gpu: ## exact search on the GPU of this machine beside what else there is (under three minutes)
	@$(call on-gpu) examples/benchmarks/gpu_search.py

# Virtual environments of their own, without the pins, and with the tests but that of the pins.
test-oldest: VERSIONS := -c tests/constraints-oldest.txt
test-newest: VERSIONS := --upgrade --upgrade-strategy eager
test-oldest: ## the tests with the oldest versions in the ranges of pyproject.toml, into .venv-oldest
test-newest: ## the tests with the newest versions there are, into .venv-newest
test-oldest test-newest: test-%:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check $(VERSIONS) -e ".[all,dev,docs]"
	.venv-$*/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --deselect $(PINS_TEST)

bench: $(FULL) ## every script in examples/benchmarks/
	@set -e; for script in $(sort $(filter-out examples/benchmarks/_%,$(wildcard examples/benchmarks/*.py))); do \
		echo "== $$script"; $(BIN)/python $$script; done

docs: $(FULL) ## the documentation site, into site/, and its links (LINKS=--check-extern: those to other sites, too)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f docs/mkdocs.yml
	$(BIN)/linkchecker --no-status --no-warnings $(LINKS) site/index.html

docs-version: $(FULL) ## the site of this version, as a folder of the branch gh-pages (PUSH=--push: and push it)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mike deploy -F docs/mkdocs.yml $(PUSH) --update-aliases \
		$$($(BIN)/python -c "import lightning_resmem; print(lightning_resmem.__version__)") latest

diagram: $(FULL) ## the picture of the packages in docs/, from the imports and docstrings
	$(BIN)/python docs/diagram.py docs/pages/assets/packages.svg

dist: $(FULL) ## wheel and source distribution, into dist/
	rm -rf dist
	$(BIN)/python -m hatchling build

clean: ## remove build outputs and caches; keeps .venv
	rm -rf site dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .grimp_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove .venv
	rm -rf $(VENV) .venv-oldest .venv-newest

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(FULL): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e ".[all,dev,docs]"
	@touch $(DEMO) $@

# Less to install, so that the demo starts sooner; a full install counts as this one too.
$(DEMO): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e ".[plots]"
	$(PIP_INSTALL) --no-deps plotnine # for a file of it
	@touch $@
