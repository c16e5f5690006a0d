# Every target sets up what it needs first; `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: setup demo test test-all test-container test-ollama fuzz faults lint format lock bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml tools/setup_environment.py
	$(PYTHON) tools/setup_environment.py $(VENV)
	touch $@

demo: setup
	$(BIN)/kolotune run --config examples/lighthouse/kolotune.yaml --output-dir $(DEMO)
	$(BIN)/python examples/lighthouse/judge.py $(DEMO) --limit 1

# By files, since tests of one file share what is costly to make; two at a time, since a training has threads of its own.
# In the order of the folders: the integration tests, whose files take longest, begin.
# A third process uses the time in which tests wait: with two, a quarter of two cores is idle.
WORKERS ?= 2
TEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Tests start many processes, which would each compile kolotune where Python is set to keep no bytecode.
test: setup
	@$(BIN)/python -m compileall -q kolotune tests
	$(TEST)

# Collecting the others takes half a minute.
IN_CONTAINER := tests/container tests/contracts.py

test-all: setup
	$(TEST) -m "not container"
	$(BIN)/python -m pytest -m container $(IN_CONTAINER)

# A real Docker engine of its own, with a data folder that is kept, so that a second time is quick. Needs root.
test-container: setup
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    ! { command -v dockerd && command -v debootstrap && command -v docker-registry; } >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq docker.io debootstrap docker-registry; fi
	KOLOTUNE_NEEDS_DOCKER=1 $(BIN)/python -m pytest -m "container and not slow" $(IN_CONTAINER)

# Against the real Ollama that OLLAMA_HOST names, instead of the stand-in; test models are removed from it.
test-ollama: setup
	KOLOTUNE_REAL_OLLAMA=1 $(BIN)/python -m pytest -m "slow or not slow" tests/unit/ollama/test_install.py \
	    tests/integration/test_ollama.py

# Looks for inputs that break a parser, for so many minutes in all; guided by coverage where atheris is installed.
MINUTES ?= 30
fuzz: setup
	$(BIN)/python tests/fuzz --minutes $(MINUTES)

# Kills at random and at system calls, for some hours; each call continues where the last one stopped. As root, on Linux,
# with Docker (see test-container): clients of a container too.
faults: setup
	$(BIN)/python tests/faults calls
	$(BIN)/python tests/faults kills
	$(BIN)/python tests/faults loop
	$(BIN)/python tests/faults container

# What Python's own library lacks on other systems. Types of other packages, whose reading takes a minute, are left out,
# and with them errors that only show without these types.
ELSEWHERE := --follow-imports skip --no-warn-unused-ignores --no-warn-return-any --allow-subclassing-any \
  --allow-untyped-decorators $(addprefix --disable-error-code=,var-annotated index call-overload)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32 $(ELSEWHERE)
	$(BIN)/mypy --platform darwin --cache-dir .mypy_cache/darwin $(ELSEWHERE)
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Against its peers, in environments of their own; takes more than an hour. Wants a quiet machine.
bench: setup
	$(BIN)/python bench

# The lock names no index and no build of torch, so that it serves machines with and without a GPU.
lock: setup
	$(BIN)/pip-compile --quiet --allow-unsafe --strip-extras --extra local --extra cluster --extra sweep --extra spreadsheets --extra dev --no-emit-index-url \
	  --no-emit-find-links --no-header --no-annotate --constraint constraints.txt -o requirements.lock pyproject.toml
	sed -i 's/^\(torch==[0-9.]*\)+.*/\1/' requirements.lock
	# The part of it that the container's image needs.
	$(BIN)/pip-compile --quiet --allow-unsafe --strip-extras --extra local --no-emit-index-url \
	  --no-emit-find-links --no-header --no-annotate --constraint requirements.lock \
	  -o kolotune/runners/container/image/requirements.lock pyproject.toml
	sed -i 's/^\(torch==[0-9.]*\)+.*/\1/' kolotune/runners/container/image/requirements.lock

clean:
	rm -rf $(VENV) $(DEMO)
