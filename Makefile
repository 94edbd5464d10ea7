# One door for all work; CI calls these targets too.
SHELL := /bin/bash
PYTHON ?= python3
# Which torch: TORCH="torch==2.13.0" from the index that pip is configured with. Choose a build with
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu      (CPU wheels)
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130    (CUDA 13.0 wheels)
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# Which transformers: the newest that pyproject.toml allows.
TRANSFORMERS ?= transformers
HOST ?= 127.0.0.1
PORT ?= 50051
# OpenAI's chat API over HTTP: a port, or 0 for a free one
HTTP_PORT ?=
# 1: a page for people at the HTTP port, which is 8000 unless said otherwise
UI ?=
# more flags of `vlcache serve`, such as "--max-num-seqs 16"
FLAGS ?=
# processes that share the test suite
JOBS ?= 2
# split: a prefill worker and a decode worker; both: one process in both roles, for a single GPU
ROLE ?= split
# 1: TLS everywhere, with certificates that are made for the occasion, and a token for clients
SECURE ?=

WORKERS_split :=
WORKERS_both := --prefill-workers 0 --decode-workers 0 --combined-workers 1
WORKERS = $(if $(filter split both,$(ROLE)),$(WORKERS_$(ROLE)),$(error ROLE is split or both, not $(ROLE)))

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup.stamp
PROTO_VENV := .venv-proto
OLDEST_VENV := .venv-oldest
# The oldest generator whose stubs run with every grpcio that the client promises to support.
GRPCIO_TOOLS := grpcio-tools==1.74.0
# One thread each: processes whose threads outnumber the cores wait for each other. In the order of tests/conftest.py:
# xdist would put files of few tests last, which are the slow ones.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo serve test heavy chaos fuzz test-containers test-matrix lint format typecheck proto proto-check docs sbom prometheus bench-gpu train-model clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

setup: $(STAMP) ## create .venv with everything (instant when it is up to date)

$(STAMP): pyproject.toml client/pyproject.toml $(wildcard shared/kernels/native/*.[ch]) \
		shared/kernels/native/build.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "vlcache needs Python >= 3.10"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python3-venv is missing: apt install python3-venv"; exit 1; }
	$(BIN)/pip install -q --disable-pip-version-check "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/pip install -q --disable-pip-version-check -e 'client[images]' -e '.[worker,http,dev]' $(TRANSFORMERS)
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install -q --disable-pip-version-check -e '.[kernels]'
	$(BIN)/python -m shared.kernels.native
	@touch $@

demo: setup ## start router and workers (ROLE=both: one), ask about sample images, print answers and bytes, stop
	$(BIN)/python -m deploy.local demo $(WORKERS)

serve: setup ## keep the same stack up in the foreground at HOST:PORT (ctrl-C drains it; HTTP_PORT=8000; UI=1: a page; SECURE=1: TLS and a token)
	$(BIN)/python -m deploy.local serve --host $(HOST) --port $(PORT) $(WORKERS) $(if $(HTTP_PORT),--http-port $(HTTP_PORT)) $(if $(UI),--ui) $(if $(SECURE),--secure) $(FLAGS)

test: setup ## the test suite, in JOBS processes (TESTS=folder or file: a part of it)
	$(PYTEST) -m "not chaos and not heavy and not containers and not fuzz" $(TESTS)

heavy: setup ## what takes long and fails seldom: ten model families, benchmarks, every kernel for every target (minutes)
	$(PYTEST) -m heavy $(TESTS)

chaos: setup ## real processes killed, stopped and drained under load: nothing may be lost (minutes)
	$(PYTEST) -m chaos $(TESTS)

fuzz: setup ## strange manifests, requests, images and calls of whole services, FUZZ_S seconds of each kind (20)
	$(PYTEST) -m fuzz --timeout 0 tests/fuzz

test-containers: setup ## build the images and run the compose file in containers of Podman; needs root (minutes)
	$(BIN)/python -m pytest -m containers -o log_cli=true -o log_cli_level=INFO $(or $(TESTS),tests/containers)

test-matrix: ## the ten families with the oldest torch and transformers, in an environment of its own (gigabytes)
	$(MAKE) heavy VENV=$(OLDEST_VENV) TORCH=torch==2.11.0 TRANSFORMERS=transformers==5.17.0 TESTS=tests/families

lint: setup ## style, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: setup ## rewrite to the house style
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format -q .

typecheck: setup ## static types
	$(BIN)/mypy

$(PROTO_VENV)/.stamp:
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/pip install -q --disable-pip-version-check $(GRPCIO_TOOLS)
	@touch $@

proto: $(PROTO_VENV)/.stamp ## regenerate the stubs under client/src from proto/
	$(PROTO_VENV)/bin/python -m grpc_tools.protoc -I proto --python_out=client/src --pyi_out=client/src \
		--grpc_python_out=client/src $$(cd proto && find vlcache -name '*.proto' | sort)

proto-check: proto ## fail when the committed stubs differ from proto/
	git diff --exit-code --stat -- client/src/vlcache/v1 client/src/vlcache/worker

docs: setup ## rewrite what is written from code or rules: dashboards, tables of metrics, flags and policies, the PrometheusRule
	$(BIN)/python -m deploy.grafana
	$(BIN)/python -m deploy.operations
	$(BIN)/python -m deploy.flags
	$(BIN)/python -m deploy.kubernetes
	$(BIN)/python -m prefill_worker.compression.catalogue

PROMETHEUS := build/prometheus/usr/bin/prometheus

sbom: setup ## the packages that services run on, with versions and licences, as CycloneDX: sbom.json
	$(BIN)/python -m deploy.sbom -o sbom.json

prometheus: ## unpack a Prometheus into build/ for the tests that need one, unless the machine has it (Debian, Ubuntu)
	@command -v promtool >/dev/null || test -x $(PROMETHEUS) || { mkdir -p build/prometheus && \
		cd build/prometheus && { apt-get -q download prometheus || { apt-get -q update && apt-get -q download prometheus; } } && \
		dpkg -x prometheus_*.deb . && rm prometheus_*.deb; } || echo "without a Prometheus its tests are skipped"

# An image that brings its own torch for its GPU needs no .venv.
bench-gpu: ## tests and benchmarks on a GPU, at most ten minutes; run again to continue (OUT=folder)
	PYTHONPATH=client/src:$$PYTHONPATH $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu \
		--out $(or $(OUT),build/bench-gpu)

train-model: setup ## train the bundled model from scratch (hours on a CPU)
	$(BIN)/python -m models.shapes_vlm.training --out $(or $(OUT),/tmp/shapes-vlm)

clean: ## remove the environments
	rm -rf $(VENV) $(PROTO_VENV) $(OLDEST_VENV)
