# Two commands for a fresh machine: `make demo` and `make test`. They set up what they need (scripts/setup) and work again without a network.

PYTHON := .venv/bin/python

.PHONY: help setup demo test lint types c-tests py-tests clean

help:
	@echo 'make demo    plug disks into a real guest (in memory where there is no QEMU) and out again'
	@echo 'make test    all tests: formatting, types, C, Python, real QEMU, real guest'
	@echo 'make lint types c-tests py-tests    the parts of make test, without the set-up'
	@echo 'make clean   remove what was built'

# The guest's part may be missing: the demo then runs in memory, and tests that need it say so. Without Python nothing runs.
setup:
	scripts/setup dev
	scripts/setup guest || echo 'going on without a real guest'

demo:
	scripts/setup python
	scripts/setup guest || echo 'going on without a real guest'
	$(PYTHON) -m tests.kit.demo

test: setup lint types c-tests py-tests

lint:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m mypy pyblock tests

c-tests:
	$(MAKE) -C tests/c check check-asan check-tsan

py-tests:
	$(PYTHON) -m pytest

clean:
	rm -rf build dist *.egg-info pyblock/*.so pyblock/_core.c .pytest_cache .mypy_cache .ruff_cache
