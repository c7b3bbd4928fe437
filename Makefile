# Every target first installs tox into .venv; tox installs its environments under .tox.
PYTHON ?= python3.11
TOX = .venv/bin/tox
# PyTorch's default wheel brings gigabytes of CUDA: where its CPU index answered when .venv was made, pip asks it too
CPU_INDEX = https://download.pytorch.org/whl/cpu
PIP_EXTRA_INDEX_URL ?= $(shell cat .venv/cpu_index 2>/dev/null)
export PIP_EXTRA_INDEX_URL

.PHONY: test avx2 demo bench peers fuzz mutants kills versions xla qeff docs clean

test: $(TOX)
	$(TOX) run-parallel --parallel-no-spinner

# the engine tests without AVX-512: each engine has its own switch
avx2: export ONEDNN_MAX_CPU_ISA = AVX2
avx2: export ATEN_CPU_CAPABILITY = avx2
avx2: export MKL_ENABLE_INSTRUCTIONS = AVX2
avx2: export XLA_FLAGS = --xla_cpu_max_isa=AVX2
avx2: $(TOX)
	$(TOX) run-parallel --parallel-no-spinner -e jax,neuron,qaic,tripy,parity -- -m engine

demo: $(TOX)
	@$(TOX) run -qq -e demo

bench: $(TOX)
	@$(TOX) run -qq -e bench -- $(BENCH)

# beside what a user would pick instead, each in an environment that is made first
peers: $(TOX)
	@$(TOX) run -qq -e bench -- --peers $(BENCH)

# the tests of bad input and of shared, with many more examples, other ones each time
fuzz: $(TOX)
	$(TOX) exec -e parity -- pytest tests/contract/test_bad_input.py -n 2 --dist=loadgroup --hypothesis-profile=fuzz $(FUZZ)
	$(TOX) exec -e shared -- pytest tests/shared --hypothesis-profile=fuzz

# mutation testing: one fault at a time in a copy of the code, which tests must notice
mutants: $(TOX)
	@$(TOX) run -qq -e mutants -- $(MUTANTS)

# kill -9 at fifty random moments of training, and an exact resume after each; Ctrl-C at 25 of each project's example
kills: $(TOX)
	$(TOX) run -e jax -- -m faults -k killed_at_random --numprocesses=0 --kills=50 --kills-seed=$$(date +%s)
	$(TOX) run -e parity -- -k ctrl_c_at_random --interrupts=25 --interrupts-seed=$$(date +%s)

# the other Pythons that shared and jax_nanogpt support; those that are not installed are skipped by name
versions: $(TOX)
	$(TOX) run --skip-missing-interpreters true -e shared-py310,shared-py312,shared-py313,jax-py312,jax-py313

# neuron_nanogpt's graphs through PyTorch/XLA, whose torch is gigabytes of CUDA but on PyTorch's index
xla: INDEX = PIP_EXTRA_INDEX_URL=$(CPU_INDEX)
xla: $(TOX)
	@if test -n "$$XLA_ALLOW_CUDA_WHEEL"; then $(TOX) run -e neuron-xla; \
	elif $(INDEX) .venv/bin/python -m pip --retries=0 --timeout=5 install --quiet --dry-run --ignore-installed --no-deps \
	  torch==2.9.1+cpu 2>/dev/null; then $(INDEX) $(TOX) run -e neuron-xla; \
	else echo "neuron-xla: SKIP, needs torch 2.9.1+cpu, from PyTorch's index (XLA_ALLOW_CUDA_WHEEL=1 takes PyPI's)"; fi

# QEfficient's exports again, from its repository or from a clone: make qeff QEFF=file:///path/to/efficient-transformers
qeff: QEFF ?= https://github.com/quic/efficient-transformers
qeff: export QEFFICIENT = git+$(QEFF)@$(shell sed -n 's/^QEfficient @ .*@//p' qaic_gpt2/requirements.txt)
qeff: $(TOX)
	@if git ls-remote --quiet "$(QEFF)" HEAD >/dev/null 2>&1; then $(TOX) run -e qeff; \
	else echo "qeff: SKIP, needs QEfficient's repository, $(QEFF) (QEFF=file:///path takes a clone)"; fi

# the READMEs' commands as a reader's: each README installs into a clean environment, and runs there
docs: $(TOX)
	$(TOX) exec -e shared -- pytest tests/docs/test_readme.py --install $(foreach name,$(wildcard *_*/README.md),--readme $(name))

# keeps trained models and other outputs
clean:
	rm -rf .venv .tox .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(TOX): Makefile
	@command -v $(PYTHON) >/dev/null || \
	  { echo "$(PYTHON) is not installed: install Python 3.11, or use another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "$(PYTHON) is not Python 3.11 to 3.13: use another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x .venv/bin/python || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) lacks venv: on Debian and Ubuntu run apt install python3.11-venv; README.md has another way" >&2; exit 1; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || { rm -rf .venv; $(PYTHON) -m venv .venv; }
	@.venv/bin/python -c "from urllib.request import urlopen; urlopen('$(CPU_INDEX)/', timeout=5)" 2>/dev/null && \
	  echo $(CPU_INDEX) >.venv/cpu_index || rm -f .venv/cpu_index
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check tox==4.67.13
	@touch $(TOX)
