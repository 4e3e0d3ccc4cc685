# Needs python3 (3.11 or later) and make; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
TEST_ARGS ?= -n 2
# For its tests alone, which skip themselves where it is not installed. It has no wheel.
DEEPSPEED := deepspeed==0.19.8

OLDEST := pytorch-lightning==2.4.0

# A rival in the rescue suite.
ARC_TRAINING := arc-training==5.2.0.post1
ARC ?= $(HOME)/.cache/lightning-nanguard/arc

.PHONY: chaos long matrix diagnose demo docs dist install-check test oldest rescue arc packages upstream bench kills transient lint types clean

# Torch goes first and alone: what depends on it must find it in place and not choose another build. DeepSpeed goes last:
# it is built with the torch that is there, and compiles nothing.
.venv/.stamp: requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements-dev.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation $(DEEPSPEED)
	touch $@

.PHONY: .venv
.venv: .venv/.stamp

# Tools that need no torch, in an environment of their own.
.venv/tools/.stamp: requirements-tools.txt
	$(PYTHON) -m venv .venv/tools
	.venv/tools/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-tools.txt
	touch $@

# The site, in build/site: every warning is an error, and nothing may be loaded from another host.
docs: .venv/tools/.stamp
	NO_MKDOCS_2_WARNING=1 .venv/tools/bin/python -m mkdocs build --quiet --strict
	.venv/tools/bin/python -m website.offline build/site

# The packages, in dist, with a strict look at their metadata.
dist: .venv/tools/.stamp
	rm -rf dist build/lib
	.venv/tools/bin/python -m build --outdir dist
	.venv/tools/bin/python -m twine check --strict dist/*

# Installs the wheel into an empty environment beside each of Lightning's two packages, and trains there; a few minutes.
install-check: dist
	for package in pytorch-lightning lightning; do \
		rm -rf build/empty && $(PYTHON) -m venv build/empty && \
		build/empty/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements-dev.txt)" && \
		build/empty/bin/python -m pip install --quiet --disable-pip-version-check $$package dist/*.whl && \
		build/empty/bin/python -I tests/installed.py $$package || exit 1; \
	done
	rm -rf build/empty

demo: .venv/.stamp
	OMP_NUM_THREADS=1 $(BIN)/python examples/demo.py

test: .venv/.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_ARGS)

# The tests that touch most of Lightning, with the oldest one that is supported.
oldest: .venv/.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/oldest $(OLDEST)
	PYTHONPATH=.venv/oldest OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_ARGS) \
		tests/trainer tests/checkpoints tests/scenarios/test_skips.py tests/scenarios/test_resuming.py

# Which failing runs are saved, and which healthy ones are left alone: small models, realistic ones, and small ones in two
# processes; FAST=1 takes a few of the forms under the guard's two settings alone, and keeps no results. What was measured of
# the healthy draws is kept, and a run that was interrupted goes on. arc-training takes part after `make arc`.
RESCUE_FAST := --contenders certain,evidence --output build/rescue.json
rescue: .venv/.stamp
	ARC_PYTHON=$(wildcard $(ARC)/bin/python) OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.rescue \
		$(if $(FAST),--fast $(RESCUE_FAST))
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.rescue --group realistic --contenders certain,evidence \
		$(if $(FAST),--fast --output build/realistic.json,--output benchmarks/results/realistic.json)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.rescue --processes 2 --jobs 1 --contenders certain,evidence \
		$(if $(FAST),--fast --output build/two-processes.json,--output benchmarks/results/two-processes.json)
	ARC_PYTHON=$(wildcard $(ARC)/bin/python) OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.rescue.harm \
		$(if $(FAST),--fast --results build/harm,--rivals all --output benchmarks/results/harm.json)

# arc-training's own release, with this project's versions of everything else, in an environment outside the repository.
arc:
	$(PYTHON) -m venv $(ARC)
	$(ARC)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements-dev.txt)"
	$(ARC)/bin/python -m pip install --quiet --disable-pip-version-check --constraint requirements-dev.txt \
		pytorch-lightning scikit-learn $(ARC_TRAINING)

# Packages that build on Lightning, each as far as it can be installed beside the others, in an environment outside the
# repository, and the guard inside each of them; a quarter of an hour. torch goes first, as above.
PACKAGES ?= $(HOME)/.cache/lightning-nanguard/packages
PACKAGE_LIST := darts==0.48.1 neuralforecast==3.3.0 pytorch-forecasting==1.8.0 chemprop==2.3.1 gluonts[torch]==0.17.0 \
	"scvi-tools>=1.4.2,<1.6" torchao==0.18.0 bitsandbytes==0.50.2
PACKAGES_PIP := $(PACKAGES)/bin/python -m pip install --quiet --disable-pip-version-check
packages:
	$(PYTHON) -m venv $(PACKAGES)
	grep '^torch==' requirements-dev.txt > $(PACKAGES)/constraints.txt
	grep -E '^(pytest|pytest-timeout|hypothesis)==' requirements-dev.txt > $(PACKAGES)/tests.txt
	$(PACKAGES_PIP) -r $(PACKAGES)/constraints.txt
	$(PACKAGES_PIP) -r $(PACKAGES)/tests.txt
	for package in $(PACKAGE_LIST); do \
		timeout 600 $(PACKAGES_PIP) --constraint $(PACKAGES)/constraints.txt $$package || echo "$$package: skipped"; \
	done
	NANGUARD_PACKAGES=1 OMP_NUM_THREADS=1 PYTHONPATH=. $(PACKAGES)/bin/python -m pytest -p no:cacheprovider tests/packages

# What the guard costs, beside clipping and other checks; a quarter of an hour on the CPU, FAST=1 takes a tenth of the rounds.
bench: .venv/.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.overhead $(if $(FAST),--fast)

# Strikes 800 runs once each and compares what they leave with the same runs without a fault; about six minutes.
transient: .venv/.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.transient --seed 1 --runs 500 --output benchmarks/results/transient.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.transient --seed 2 --runs 300 --readback deferred \
		--output benchmarks/results/transient-deferred.json

# Puts runs drawn from a seed to faults of every kind, place and moment, and checks what the guard promises, for so many
# minutes. A failing draw prints the line that repeats it. arc-training takes part after `make arc`.
SEED ?= 0
MINUTES ?= 2
chaos: .venv/.stamp
	ARC_PYTHON=$(wildcard $(ARC)/bin/python) OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.chaos --seed $(SEED) --minutes $(MINUTES)

# A long run with a fault now and then: memory, the time of a step and files may not grow. The loop of Lightning alone takes
# several minutes for a million steps.
STEPS ?= 1000000
EVERY ?= 1000
long: .venv/.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.long_run --steps $(STEPS) --every $(EVERY)

# The oldest and the newest versions of Python, torch, Lightning and NumPy, an environment outside the repository for each
# row. TORCH_INDEX=https://download.pytorch.org/whl/cpu takes builds of torch without CUDA.
ROWS ?=
matrix: .venv/.stamp
	$(BIN)/python -m benchmarks.matrix $(ROWS)

# Kills 200 runs at random moments and looks at what they leave; about three minutes.
kills: .venv/.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kills

# Which causes the diagnosis names, on failing runs of every cause and on healthy ones; a few minutes, FAST=1 takes one
# seed a form, RESUME=1 goes on where an interrupted run ended.
diagnose: .venv/.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.diagnose --show-failures $(if $(FAST),--draws 1 --healthy 0) $(if $(RESUME),--resume)

# Lightning's own tests with the guard in every Trainer; those that fail, once more with it and with an empty callback.
# SOURCES is a checkout of Lightning's repository at the tag of the installed version, TESTS what of it to run.
TESTS ?= tests/tests_pytorch/trainer
upstream: .venv/.stamp
	@test -n "$(SOURCES)" || { echo "make upstream SOURCES=/path/to/pytorch-lightning TESTS=tests/tests_pytorch/trainer"; exit 2; }
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.upstream $(SOURCES) $(TESTS)

lint: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.stamp
	$(BIN)/mypy

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info demo_logs example_logs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
