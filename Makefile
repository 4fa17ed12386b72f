# make demo: a spiking network trained on real images; make test: everything that CI runs.
PYTHON ?= python3
VENV ?= .venv
# TORCH=2.11.0 PYTHON=python3.12: any target in an environment of its own, with that torch on that Python.
# TRITON: which one there; left out, the one that this torch asks for, or that of constraints.txt if it asks for none.
# setuptools follows too: torch 2.11 wants an older one than torch 2.13.
TORCH ?=
TRITON ?=
PINS := constraints.txt
ifneq ($(TORCH),)
VENV := .venv-torch-$(TORCH)-$(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])')
PINS := $(VENV)/constraints.txt
endif
BIN := $(VENV)/bin
RUN := runs/demo

.PHONY: demo test test-torch sanitize lint format docs bench gpu gpu-bundle gpu-rehearsal wheels release-check clean

# Files are compiled to bytecode when they are first imported, not thousands of them here.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint $(PINS)
ASKS = from importlib.metadata import requires; print(any(r.startswith("triton") for r in requires("torch")))

# $(call while_compiling,COMMAND): the extensions are compiled meanwhile, with what setup.py needs in a folder of its own.
# The installation of trtkern finds the objects, and links them; where they could not be compiled it says why.
BUILDERS = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	--target $(VENV)/builders setuptools pybind11
COMPILE = PYTHONPATH=$(VENV)/builders $(BIN)/python setup.py -q build_ext --build-lib $(VENV)/compiled
while_compiling = { $(BUILDERS) && $(COMPILE); } >/dev/null 2>&1 & $(1); status=$$?; wait; exit $$status

$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),)
	$(call while_compiling,$(INSTALL) torch)
else
	grep -v -e '^torch==' -e '^triton==' -e '^setuptools==' constraints.txt > $(PINS)
	$(if $(TRITON),echo 'triton==$(TRITON)' >> $(PINS))
	$(call while_compiling,$(INSTALL) 'torch==$(TORCH)')
	echo 'torch==$(TORCH)' >> $(PINS)
	$(if $(TRITON),,$(BIN)/python -c '$(ASKS)' | grep -q True || grep '^triton==' constraints.txt >> $(PINS))
endif
	@touch $@

# What the headers that the build prints come from.
PRINTED := surrogates neurons rows straight expressions adjoint dialect compiler
# The stamp is newer than what it was made from: installing again happens when the build changes, not on each call.
BUILT := $(VENV)/torch setup.py pyproject.toml constraints.txt $(wildcard csrc/*/*) $(PRINTED:%=trtkern/%.py)

$(VENV)/installed: $(BUILT)
	$(INSTALL) --editable ".[train]"
	@touch $@

# Of what reads events the tests need three packages, without what those ask for; webdataset reads and writes tar
# shards beside ours; curvlinops is an oracle of curvature.
# The other libraries of spiking networks are what the conversions are compared with.
ORACLE := curvlinops-for-pytorch backpack-for-pytorch einconv einops linear_operator opt-einsum scipy tqdm

$(VENV)/installed-dev: $(BUILT) bench/peers.txt
	$(INSTALL) --editable ".[train,interop,triton,tensorboard,docs,dev]"
	$(INSTALL) --no-deps tonic aedat h5py webdataset braceexpand pyyaml $(ORACLE) --requirement bench/peers.txt
	@touch $@

demo: $(VENV)/installed
	rm -rf $(RUN)
	$(BIN)/trtkern train --run-dir $(RUN)

# The 16-lane vectors of AVX-512 are also built for AVX2, so that their code runs in the tests everywhere.
# Two workers with one thread each: small parallel regions of two processes on two cores wait for each other. What a
# file compiles is compiled once (loadfile). Where a test takes two threads they sleep while they wait (passive).
# Bytecode is kept even where the environment says not to: many processes import torch, in half the time.
# Files come in the order of tests/conftest.py, which has the longest first.
test: export PYTHONDONTWRITEBYTECODE =
# Inductor compiles where it is called: processes of its own would import torch once more, and find no core that is idle.
test: export TORCHINDUCTOR_COMPILE_THREADS = 1
test: export TRTKERN_CPU_WIDE = 1
test: export OMP_NUM_THREADS = 1
test: export OMP_WAIT_POLICY = passive
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests $(PYTEST)

# What became of the tests goes into docs/versions.csv and docs/backends.md, unless PYTEST chose some of them.
test-torch:
	@test -n '$(TORCH)' || { echo 'which torch? make test-torch TORCH=2.11.0 [PYTHON=python3.12] [TRITON=3.6.0]'; exit 2; }
	$(if $(PYTEST),,TRTKERN_VERSIONS=docs/versions.csv) $(MAKE) test; status=$$?; \
	$(BIN)/python docs/coverage.py --versions && exit $$status

# The kernels for packed spikes, under the sanitizers of g++; a report ends the run. Leaks are Python's and torch's.
SANITIZED = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 OMP_NUM_THREADS=1
sanitize: $(VENV)/installed-dev
	TRTKERN_SANITIZE=1 TRTKERN_CUDA=0 $(BIN)/python setup.py -q build_ext --build-lib build/sanitized
	$(SANITIZED) $(BIN)/python tests/sanitized.py build/sanitized -q -p no:cacheprovider \
		tests/test_spike_conv_kernels.py tests/test_spikes.py $(PYTEST)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror bench/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i bench/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu

# A warning is an error, and so are a block, a command line or a link of a page that does not work, a notebook whose
# cell fails, and a public name without an entry. Notebooks that ran are kept, until they change.
SITE := docs/_build/html
docs: export OMP_NUM_THREADS = 1
docs: $(VENV)/installed-dev
	$(BIN)/python docs/coverage.py
	$(BIN)/python docs/measured.py
	$(BIN)/python -m pytest -q tests/test_docs.py tests/test_coming_from.py tests/test_public_api.py tests/test_notebooks.py
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --builder html docs $(SITE)
	@test -s $(SITE)/searchindex.js && test -s $(SITE)/objects.inv && echo "the site: $(CURDIR)/$(SITE)/index.html"

bench: $(VENV)/installed-dev
	$(BIN)/trtkern bench --budget 600
	$(BIN)/trtkern bench --op step

# On a machine with a CUDA GPU, with its own torch and Triton; no network. GPU_MINUTES: of everything together.
GPU_MINUTES ?= 8
gpu:
	$(PYTHON) bench/gpu.py --minutes $(GPU_MINUTES)

gpu-bundle:
	$(PYTHON) bench/gpu.py --bundle

gpu-rehearsal: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python bench/gpu.py --rehearse

# What makes a release has an environment of its own, without torch. Where Docker works the wheels are made by
# cibuildwheel for Python 3.11 to 3.14; elsewhere, and in release-check, by the Pythons of this machine.
RELEASE := .venv-release
$(RELEASE)/installed: packaging/requirements.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --disable-pip-version-check --requirement packaging/requirements.txt
	@touch $@

wheels: $(RELEASE)/installed
	PATH="$(CURDIR)/$(RELEASE)/bin:$$PATH" $(RELEASE)/bin/python packaging/wheels.py $(WHEELS)

# SITE: see packaging/release_check.py; left out, pip gets torch for each Python, which may be gigabytes.
release-check: $(RELEASE)/installed
	PATH="$(CURDIR)/$(RELEASE)/bin:$$PATH" $(RELEASE)/bin/python packaging/release_check.py \
		$(if $(SITE),--site '$(SITE)') $(CHECK)

clean:
	rm -rf build dist *.egg-info trtkern/_cpu*.so trtkern/_cuda*.so $(VENV) $(RELEASE)
