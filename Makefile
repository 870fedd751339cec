# `make help` lists the targets. Every target that needs the environment makes it first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODELS ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup serve test torture test-gpu test-dockerfile check format bench bench-server demo browser clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Create .venv with everything that serving, testing and benchmarking need

$(INSTALLED): requirements.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo 'venv is missing: apt-get install python3-venv'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt -c constraints.txt
	@touch $@

serve: $(INSTALLED) ## Serve models.yaml on 127.0.0.1:8000 (MODELS="flux" for just that one, ARGS for flags)
	$(BIN)/python -m server serve $(MODELS) $(ARGS)

test: $(INSTALLED) ## Run all tests
	$(BIN)/python -m pytest $(ARGS)

torture: $(INSTALLED) ## Send a million malformed requests, and 500 slow clients (COUNT for another number)
	VAE_TEST_MALFORMED=$(or $(COUNT),1000000) $(BIN)/python -m pytest tests/http/test_malformed.py tests/http/test_slow_clients.py $(ARGS)

test-gpu: $(INSTALLED) ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-dockerfile: $(INSTALLED) ## Carry the Dockerfile out in a clean Debian root and try the result (root, debootstrap)
	$(BIN)/python -m deploy.chroot_build $(ARGS)

check: $(INSTALLED) ## Lint, types, layers and the fast tests, in seconds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/http/test_wire.py tests/test_config.py tests/test_dockerfile.py tests/families tests/outputs

format: $(INSTALLED) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## Decoders, outputs and videos beside their peers: tables and plots (half an hour)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt -c constraints.txt
	$(BIN)/python -m benchmarks.decode --sizes 256 512 1024 2048 4096 --repeats 3 --compile --save decode-cpu
	$(BIN)/python -m benchmarks.codecs
	$(BIN)/python -m benchmarks.video
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.plot

bench-server: $(INSTALLED) ## Time this server, the hosted design and LitServe side by side (ten minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt -c constraints.txt
	$(BIN)/python -m benchmarks.server --save server $(ARGS)
	$(BIN)/python -m benchmarks.plot_server server

demo: $(INSTALLED) ## Train the embedded demo model again
	$(BIN)/python server/demo/train.py $(ARGS)

browser: ## Install the browser that the page's tests drive (Debian)
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }

clean: ## Remove the environment and every cache
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
