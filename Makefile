# `make help` lists the targets. Every target that needs the environment creates it first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SERVING := $(VENV)/.serving
INSTALLED := $(VENV)/.installed
MODELS ?=
ARGS ?=
export ARGS

.DEFAULT_GOAL := help
.PHONY: help setup serve test torture soak figures test-gpu test-hub test-sdnext test-contract test-image test-endpoints test-ray test-comfyui check format bench bench-server gpu-report screenshots demo browser prometheus nginx generated-clients sbom clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Create .venv with the packages for serving and testing

# Only what serving needs. `deploy.install` says which packages these are and how large they are.
$(SERVING): requirements.txt constraints.txt
	@$(PYTHON) -m deploy.install $(VENV) $(if $(PORT_FROM),--port-from=ARGS)
	@touch $@

$(INSTALLED): $(SERVING) requirements-dev.txt deploy/ray-requirements.txt
	@echo 'installing what the tests need'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt -r deploy/ray-requirements.txt -c constraints.txt
	@touch $@

serve: PORT_FROM := yes
serve: $(SERVING) ## Serve models.yaml on 127.0.0.1:8000 (MODELS="flux" for only that model, ARGS="--port 8001" for flags)
	@$(BIN)/python -m server serve $(MODELS) $(ARGS)

# Most tests wait for processes, so running two at a time takes half as long, even on two cores.
TOGETHER := -n 2 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED) ## Run all tests
	$(BIN)/python -m pytest $(TOGETHER) $(ARGS)

PROMISES := tests/test_load.py tests/workers/test_workers.py tests/workers/test_fairness.py tests/web/test_malformed.py \
	tests/web/test_slow_clients.py tests/web/test_held.py

torture: $(INSTALLED) ## Run a million malformed requests, 100 kills, 50 drains, 10,000 compared answers (SCALE=5, hours)
	VAE_TEST_MALFORMED=$(or $(COUNT),1000000) VAE_TEST_SCALE=$(or $(SCALE),5) $(BIN)/python -m pytest -s $(PROMISES) $(ARGS)

soak: $(INSTALLED) ## Watch the memory over 500,000 requests, and in a control that leaks (SCALE=125, hours)
	VAE_TEST_SCALE=$(or $(SCALE),125) $(BIN)/python -m pytest -s tests/test_load.py -k memory $(ARGS)

figures: $(INSTALLED) ## Measure what the server promises and write docs/figures.md
	rm -f /tmp/vae-figures.jsonl
	VAE_TEST_SLOW_MIB=48 VAE_FIGURES=/tmp/vae-figures.jsonl $(BIN)/python -m pytest $(PROMISES)
	$(BIN)/python -m tests.figures /tmp/vae-figures.jsonl

test-gpu: $(INSTALLED) ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-hub: $(INSTALLED) ## Compare known.yaml with the Hub, and decodes by real weights with published values (needs network; the decodes a CUDA device)
	VAE_TEST_HUB=1 $(BIN)/python -m pytest -q -rs -m hub tests/test_hub.py tests/test_hub_facts.py

test-sdnext: $(INSTALLED) ## Test clients/sdnext's patch in a checkout of SD.Next (SDNEXT=FOLDER)
	SDNEXT="$(SDNEXT)" $(BIN)/python -m pytest -q tests/clients/test_sdnext_patch.py

test-image: $(INSTALLED) ## Build the image, run it and test it with the contract's cases (podman or docker; deploy/README.md)
	$(BIN)/python -m deploy.image $(ARGS)

test-endpoints: ## Test handler.py with the package versions of Inference Endpoints' image (TOOLKIT=FOLDER: inside its own app; 6 GB)
	$(PYTHON) -m deploy.endpoints $(ARGS)

test-contract: $(INSTALLED) ## Run the contract's cases, with diffusers' own client, against `python -m server serve`
	$(BIN)/python -m tests.contract serve

test-ray: $(INSTALLED) ## Test the contract, kills and scaling on a local Ray Serve with two CPU replicas
	$(BIN)/python -m pytest tests/test_ray_serve.py $(ARGS)

test-comfyui: $(INSTALLED) ## Test the nodes for ComfyUI in a real one (COMFYUI=FOLDER with its packages in .venv or venv, else COMFYUI_PYTHON=FILE)
	$(if $(COMFYUI),,$(error give COMFYUI=FOLDER, a checkout of ComfyUI with its packages installed))
	COMFYUI=$(abspath $(COMFYUI)) COMFYUI_PYTHON=$(COMFYUI_PYTHON) $(BIN)/python -m pytest tests/clients/comfyui $(ARGS)

FAST := tests/contract tests/config tests/test_dockerfile.py tests/families tests/outputs \
	tests/scheduling tests/test_walls.py

check: $(INSTALLED) ## Check style, types and layers, and run the fast tests, in seconds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(FAST)

format: $(INSTALLED) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## Compare decoders, the encoder, codecs and videos with their peers: tables and plots (half an hour)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt -c constraints.txt
	$(BIN)/python -m benchmarks.decode --sizes 256 512 1024 2048 4096 --repeats 3 --compile --save decode-cpu
	$(BIN)/python -m benchmarks.encode --sizes 512 1024 --repeats 3 --save encode-cpu
	$(BIN)/python -m benchmarks.codecs
	$(BIN)/python -m benchmarks.video
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.plot

bench-server: $(INSTALLED) ## Compare this server with the hosted design and LitServe under load (ten minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt -c constraints.txt
	$(BIN)/python -m benchmarks.server --save server $(ARGS)
	$(BIN)/python -m benchmarks.plot_server server

gpu-report: $(INSTALLED) ## Report rates, times, memory and errors of a GPU (nine minutes; ARGS="--device cpu --minutes 1" tests the report)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

screenshots: $(INSTALLED) ## Take the picture of the web page that README shows (needs chromium)
	$(BIN)/python -m tests.screenshots $(ARGS)

demo: $(INSTALLED) ## Train the embedded demo model again
	$(BIN)/python server/demo/train.py $(ARGS)

browser: ## Install the browser that the tests of the web page use (Debian)
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }

prometheus: ## Install Prometheus for the tests of deploy/compose (Debian)
	command -v prometheus >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus; }

nginx: ## Install nginx for the tests of deploy/proxies, without starting it (Debian)
	command -v nginx >/dev/null || test -x /usr/sbin/nginx || \
		{ apt-get update -qq && RUNLEVEL=1 apt-get install -y -qq --no-install-recommends nginx-light; }

# In a folder of their own, because their requirements conflict with constraints.txt.
CLIENTS := $(VENV)/clients
GENERATORS := tests/clients/generated

generated-clients: $(CLIENTS)/.installed ## Install the generators of clients for the tests of /openapi.json (PyPI, npm)

$(CLIENTS)/.installed: $(GENERATORS)/requirements.txt $(GENERATORS)/package.json
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -r $(GENERATORS)/requirements.txt
	cp $(GENERATORS)/package.json $(CLIENTS)/package.json
	$(CLIENTS)/bin/npm install --prefix $(CLIENTS) --no-audit --no-fund --no-package-lock --ignore-scripts --loglevel=error
	@touch $@

# Likewise. It reads the packages of the environment for serving from outside.
SBOM := $(VENV)/sbom

sbom: $(SERVING) $(SBOM)/.installed ## Write sbom.spdx.json: the packages that serving needs, with versions and licences
	@$(SBOM)/bin/python -m deploy.sbom "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" sbom.spdx.json

$(SBOM)/.installed: deploy/sbom-requirements.txt
	$(PYTHON) -m venv $(SBOM)
	$(SBOM)/bin/python -m pip install --quiet --disable-pip-version-check -r deploy/sbom-requirements.txt
	@touch $@

clean: ## Remove the environment and every cache
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
