# make demo: convert the model that ships.  make test: the tests; make test-slow: those that CI leaves out.
# Each makes its own environment in .venv first.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CPU_INDEX := https://download.pytorch.org/whl/cpu
TRITON := triton==3.9.0
RUN := demo-run

.PHONY: env demo test test-slow lint audit clean

env: $(VENV)/.ready

# torch comes first: on Linux PyPI's torch brings gigabytes of CUDA, so a machine without an NVIDIA GPU asks PyTorch's
# own CPU index. Where that cannot be reached, the second line installs what pip finds. Constraints are for the third
# line only, because the CPU index does not carry every version of what torch needs. torch's CUDA builds bring their own
# Triton; elsewhere one is added, because the tests run the Triton kernels in its interpreter.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 && ! $(PY) -c 'import torch' 2>/dev/null; \
	then $(PIP) install --retries 1 --timeout 20 --index-url $(CPU_INDEX) "$$(grep '^torch==' constraints.txt)" || true; fi
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt -e ".[dev]"
	if [ "$$(uname -s)" = Linux ] && ! $(PY) -c 'import triton' 2>/dev/null; then $(PIP) install $(TRITON); fi
	touch $@

demo: env
	$(VENV)/bin/tcal-compile embedded --policy uniform:25% --calib-sequences 128 --calib-length 256 --align-steps 120 -o $(RUN)
	$(VENV)/bin/tcal eval $(RUN) --text tcal_compiler/assets/text/heldout.txt --length 512
	$(VENV)/bin/tcal verify $(RUN)
	$(VENV)/bin/tcal generate $(RUN) "The old man"
	@sed '/^## Layers/,$$d' $(RUN)/report.md
	@echo "All of it: $(RUN)/report.md; with plots: $(RUN)/report.html"

test: env
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q -m "not slow" tests

test-slow: env
	$(PY) -m pytest -n 2 -q -m slow tests

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy -p tcal_compiler

# In an environment of its own; asks the vulnerability service of PyPI, and fails where that knows a package not at all.
audit:
	test -x .audit/bin/pip-audit || { $(PYTHON) -m venv .audit && .audit/bin/pip install "pip-audit>=2.9"; }
	.audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

clean:
	rm -rf $(VENV) .audit $(RUN) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
