# make demo   installs if needed, makes the tiny model, trains it with the real engine on this CPU
# make test   installs if needed, runs all tests
# make docs   writes the generated parts of docs/*.md anew
# make dashboards   writes the dashboards and rules of grafana/ anew
# make install REQ=requirements/gpu.txt   the CUDA set instead of the CPU set
PY ?= python3
VENV ?= .venv
REQ ?= requirements/cpu.txt
BIN := $(VENV)/bin

# uv does not read pip's settings: hand over pip's find-links, if there are any (spaces -> commas).
FIND_LINKS := $(strip $(shell $(PY) -m pip config get global.find-links 2>/dev/null || echo "$$PIP_FIND_LINKS"))
comma := ,
empty :=
ifneq ($(FIND_LINKS),)
export UV_FIND_LINKS ?= $(subst $(empty) ,$(comma),$(FIND_LINKS))
else ifneq ($(findstring cpu,$(REQ)),)
export UV_TORCH_BACKEND ?= cpu
else
export UV_TORCH_BACKEND ?= auto
endif
# Without byte code every process of a first run compiles vLLM and torch anew.
export UV_COMPILE_BYTECODE ?= 1
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-fast lint docs dashboards lock install clean

demo: install
	$(BIN)/asyncgrpo launch --config configs/tiny.toml --actors 2 --learners 2

test: install
	$(BIN)/pytest

test-fast: install
	$(BIN)/pytest -m "not slow and not engine and not gpu and not prometheus and not slurm and not netns"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/python docs/generate.py

dashboards: install
	$(BIN)/python grafana/generate.py

install: $(VENV)/.installed

$(VENV)/.installed: $(REQ) pyproject.toml
	@echo "installing $(REQ) into $(VENV) (about 2 GB for the CPU set)"
	@$(PY) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PY=python3.11')"
	$(PY) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check uv || echo "no uv here; pip takes its place (slower)"
	$(BIN)/uv pip install -q --no-deps -r $(REQ) || $(BIN)/python -m pip install -q --no-deps -r $(REQ)
	$(BIN)/uv pip install -q --no-deps --target $(VENV)/peers -r requirements/peers.txt || \
	  $(BIN)/python -m pip install -q --no-deps --target $(VENV)/peers -r requirements/peers.txt
	$(BIN)/uv pip install -q --no-deps -e . || $(BIN)/python -m pip install -q --no-deps -e .
	@$(BIN)/python -c "from importlib.metadata import distributions as d; import sys; \
	bad = sorted({m for m in ('torchvision', 'torchaudio', 'torchcodec') for x in d() if x.name == m}); \
	sys.exit(f'remove {bad}: they break CPU torch' if bad and 'cpu' in '$(REQ)' else 0)"
	@$(BIN)/python -W ignore -c "import torch, transformers, vllm, asyncgrpo; \
	print('installed: torch', torch.__version__, '| transformers', transformers.__version__, \
	'| vllm', vllm.__version__, '| asyncgrpo', asyncgrpo.__version__)" 2>/dev/null
	@touch $@

# The pinned sets are made by uv; torchvision, torchaudio, torchcodec and triton are left out of
# the CPU set because their only builds are for CUDA and break the import of CPU torch.
lock:
	$(BIN)/uv pip compile -q requirements/cpu.in --overrides requirements/cpu.overrides -p 3.11 \
	  --no-annotate --no-header -o requirements/cpu.txt

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
