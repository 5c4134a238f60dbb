# Two commands for a fresh machine: `make demo` and `make test`. They set up what they need
# (scripts/setup) and work again without a network.

PYTHON := .venv/bin/python

.PHONY: help setup demo test quick lint types c-tests py-tests bench bench-short instructions fuzz fuzz-replay sanitize-extension \
	soak soak-qemu storm model races eager sdist-check clean

help:
	@echo 'make demo    plug disks into a real guest (in memory where there is no QEMU) and out'
	@echo '    again'
	@echo 'make test    all tests: formatting, types, C, Python, real QEMU, real guest'
	@echo 'make quick   what takes two minutes: formatting, types, the unit tests but for the'
	@echo '    slow ones, two files on a paused QEMU'
	@echo 'make lint types c-tests py-tests    the parts of make test, without the set-up'
	@echo 'make bench   all benchmarks: one table of ratios, the plots, docs/benchmarks.md'
	@echo 'make bench-short    the guards of CI: instructions, crossings, calls, a few rounds'
	@echo '    of each ratio'
	@echo 'make fuzz SECONDS=600    coverage-guided fuzzing of the core'
	@echo 'make sanitize-extension    the unit tests on an extension built with the address and'
	@echo '    undefined-behaviour sanitizers'
	@echo 'make soak    a million operations on 10,000 sandboxes in memory, through one store'
	@echo '    (OPERATIONS=, SANDBOXES=)'
	@echo 'make soak-qemu    5,000 attaches and detaches on a real QEMU, and a flood of a'
	@echo '    million events: memory stays (PAIRS=, EVENTS=)'
	@echo 'make storm SECONDS=600    processes on real QEMUs, stopped and killed at random;'
	@echo '    nothing is leaked, lost or doubled (SEED=)'
	@echo 'make model STEPS=100000    more steps of the state machine that tests recovery'
	@echo '    against a model'
	@echo 'make races   ten processes on one store for a minute'
	@echo 'make sdist-check    build an sdist, install it in a fresh environment, run its own'
	@echo '    tests (TESTS=tests/unit for more)'
	@echo 'make eager   the unit tests on an event loop whose tasks begin at once'
	@echo '    (asyncio.eager_task_factory)'
	@echo 'make clean   remove what was built'

# The guest's part may be missing: the demo then runs in memory, and tests that need it say so.
# Without Python nothing runs.
setup:
	scripts/setup dev
	scripts/setup guest || echo 'going on without a real guest'

demo:
	scripts/setup blocking cli
	scripts/setup guest || echo 'going on without a real guest'
	$(PYTHON) -m tests.kit.demo

test: setup lint types c-tests py-tests

# Not among them: tests/host, and what starts many processes, or tries every byte or thousands of
# steps.
SLOW := tests/unit/doors/test_cli*.py tests/unit/life/test_model.py tests/unit/kata/test_state_bad.py

quick: lint types
	$(PYTHON) -m pytest -q tests/unit tests/real/test_qemu_inventory.py tests/real/test_qemu_descriptors.py $(SLOW:%=--ignore-glob='%')

lint:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m mypy pyblock tests
	MYPYPATH=tests $(PYTHON) -m mypy benchmarks

c-tests: fuzz-replay
	$(MAKE) --no-print-directory -C tests/c check check-asan check-tsan

py-tests:
	$(PYTHON) -m pytest

bench:
	scripts/setup bench
	scripts/setup guest || echo 'going on without a real machine'
	$(PYTHON) -m pytest benchmarks --benchmark-quiet
	$(PYTHON) benchmarks/instructions.py --table
	PYTHONPATH=tests $(PYTHON) benchmarks/plots.py
	$(PYTHON) benchmarks/page.py

bench-short: instructions
	$(PYTHON) benchmarks/crossings.py --check
	$(PYTHON) benchmarks/story.py --check
	$(PYTHON) -m pytest benchmarks --short --benchmark-quiet

instructions:
	$(PYTHON) benchmarks/instructions.py --check

fuzz:
	scripts/setup fuzz
	$(MAKE) --no-print-directory -C tests/fuzz run SECONDS=$(or $(SECONDS),60)

fuzz-replay:
	$(MAKE) --no-print-directory -C tests/fuzz replay

sanitize-extension:
	PYTHON=$(PYTHON) scripts/sanitize-extension

soak:
	PYTHONPATH=tests $(PYTHON) -m support.soak --operations $(or $(OPERATIONS),1000000) --sandboxes $(or $(SANDBOXES),10000)

soak-qemu:
	scripts/setup qemu
	PYTHONPATH=tests $(PYTHON) -m support.soak_qemu --pairs $(or $(PAIRS),5000) --events $(or $(EVENTS),1000000)

storm:
	scripts/setup qemu
	PYTHONPATH=tests $(PYTHON) -m storm --seconds $(or $(SECONDS),600) $(and $(SEED),--seed $(SEED))

model:
	PYBLOCK_MODEL_STEPS=$(or $(STEPS),100000) $(PYTHON) -m pytest tests/unit/life/test_model.py -s

races:
	PYBLOCK_LONG=1 $(PYTHON) -m pytest tests/host/test_races.py -s

sdist-check:
	scripts/sdist-check $(TESTS)

eager:
	PYBLOCK_EAGER=1 $(PYTHON) -m pytest tests/unit tests/host

clean:
	rm -rf build dist *.egg-info pyblock/core/*.so pyblock/core/_core.c .pytest_cache .mypy_cache .ruff_cache
