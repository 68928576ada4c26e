# Every target sets up what it needs. PYTHON=python3.12 picks another interpreter; CONSTRAINTS= leaves the pins out.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt

BIN := .venv/bin
PIP := $(BIN)/python -m pip install $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# --must-run: a run that selects nothing, or skips all that it selects, fails.
PYTEST := $(BIN)/python -m pytest --must-run

.DEFAULT_GOAL := help
.PHONY: help venv venv-deepspeed readers runtimes demo test test-all test-peers lint format docs dist smoke

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' Makefile

venv: .venv/.installed  ## make .venv with the package, editable, and what the tests and the demo need

venv-deepspeed: .venv/.deepspeed  ## add DeepSpeed to .venv

readers: .venv-readers/.installed venv  ## compare what transformers 4, mlx-lm and CTranslate2 make of trimmed models; TYPES=all: every type (hours)
	$(if $(TYPES),TRIMLLM_READER_TYPES="$(TYPES)" )$(PYTEST) -m slow tests/readers

runtimes: .venv-runtimes/.installed venv  ## export tiny trimmed models to llama.cpp, ONNX, OpenVINO, MLX, CTranslate2, and compare
	$(PYTEST) -m slow tests/runtimes

.venv-runtimes/.installed: setup.cfg
	$(PYTHON) -m venv .venv-runtimes
	.venv-runtimes/bin/pip install -q torch==2.13.0 '.[runtimes]'
	touch $@

.venv-readers/.installed: Makefile
	for reader in transformers mlx ctranslate2; do $(PYTHON) -m venv .venv-readers/$$reader || exit 1; done
	.venv-readers/transformers/bin/pip install -q torch==2.13.0 numpy transformers==4.57.6 huggingface_hub==0.36.0 tokenizers==0.22.1
	.venv-readers/mlx/bin/pip install -q torch==2.13.0 numpy 'mlx[cpu]' mlx-lm
	.venv-readers/ctranslate2/bin/pip install -q torch==2.13.0 numpy ctranslate2 transformers==4.57.6
	touch $@

.venv/.installed: setup.cfg pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[dev,plot]'
	touch $@

.venv/.deepspeed: .venv/.installed
	$(PIP) -e '.[deepspeed]'
	touch $@

.venv/.docs: .venv/.installed
	$(PIP) -e '.[docs]'
	touch $@

demo: venv  ## trim a small model on a synthetic medical task, without network, in under 3 minutes
	$(BIN)/python recipes/medical.py --demo

test: venv venv-deepspeed  ## the tests of one process, then those of several, each engine once
	$(PYTEST) -n 2 --dist loadfile -m "not distributed and not deepspeed and not slow"
	$(PYTEST) -m "(distributed or deepspeed) and not slow"

test-all: test  ## all of the above, then the slow ones: resume under every engine, whole recipes, the whole zoo
	$(PYTEST) -n 2 --dist loadfile -m "slow and not distributed and not deepspeed"
	$(PYTEST) -m "slow and (distributed or deepspeed)"

test-peers: venv  ## run PEFT's and TRL's own tests on trimmed models (hours; it goes on where it stopped): see docs/readers.md
	$(BIN)/python tests/peers/run_peft.py
	$(BIN)/python tests/peers/run_trl.py

lint: venv  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy trimllm_hf

docs: .venv/.docs  ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: venv  ## build the wheel and the source archive into dist/, and check them
	rm -rf dist
	$(PIP) -q build twine
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*

smoke: dist  ## install the wheel alone into a clean environment, and use it there
	rm -rf build/smoke && $(PYTHON) -m venv build/smoke
	build/smoke/bin/python -m pip install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) dist/*.whl
	cp tests/release/smoke.py build/smoke && cd build/smoke && bin/python smoke.py $(TAG)

format: venv  ## let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
