# make demo | test | bench | gpu | lint | wheel | build | clean     each does its own set-up, in $(VENV)
#
#   PYTHON=python3.12   start from this Python; one that can import torch is used offline
#   VENV=folder         where the environment goes
#   ARGS="..."          more arguments for pytest (make test) or memkern (make demo, make bench)

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
IN_VENV := $(VENV)/bin/python
PIP := $(IN_VENV) -m pip --disable-pip-version-check

.PHONY: demo test bench gpu gpu-test gpu-bench lint wheel build env clean distclean

demo: build
	$(IN_VENV) -m memkern demo $(ARGS)

# mypy keeps one core busy, the compiler the other.
test: env
	@$(MAKE) --no-print-directory -j2 build lint
	bash scripts/test.sh $(IN_VENV) $(ARGS)

bench: build
	$(IN_VENV) -m memkern bench $(ARGS)

gpu: gpu-test gpu-bench

gpu-test: env
	$(IN_VENV) scripts/gpu.py test $(ARGS)

gpu-bench: env
	$(IN_VENV) scripts/gpu.py bench $(ARGS)

lint: env
	bash scripts/lint.sh $(IN_VENV)

build: env
	$(IN_VENV) setup.py -q build_ext --inplace
	@test -x $(VENV)/bin/memkern || PYTHONWARNINGS=ignore $(PIP) install -q --no-build-isolation --no-deps --editable .

# Old build folders would put modules that are gone into the wheel.
wheel: env
	rm -rf build/lib* build/bdist*
	$(PIP) wheel -q --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist

env: $(VENV)/ready

$(VENV)/ready: pyproject.toml scripts/make_env.sh scripts/missing.py
	PYTHON="$(PYTHON)" bash scripts/make_env.sh $(VENV)
	@touch $@

clean:
	rm -rf build dist *.egg-info compile_commands.json .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	rm -f memkern/_C*.so memkern/_ops_*.so

distclean: clean
	rm -rf $(VENV)
