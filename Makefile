# Everything sets itself up: the Debian packages that are missing (as root or by sudo), the
# virtual environment .venv, qmpblock in it. With nothing to set up, that takes no time.

PYTHON ?= python3   # makes .venv: 3.11 or newer
QEMU ?=             # the QEMU under test, a path; empty: the one in the path, then a newer one
ARGS ?=             # more words for pytest, such as -k NAME or -x

RUN = .venv/bin/python

.PHONY: help setup demo test check matrix soak fuzz bench firmware clean

help:  ## Show what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## Install what is missing, and nothing else
	@PYTHON='$(strip $(PYTHON))' tools/setup.sh

demo: setup  ## Watch the map of a running disk change (under a minute)
	@.venv/bin/qmpblock demo

test: setup  ## Check and test it all; QEMU=/path/to/qemu-system-x86_64 tests on that one only
	@$(RUN) tools/run_tests.py test --qemu '$(strip $(QEMU))' -- $(ARGS)

check: setup  ## Ruff, import-linter and mypy only
	@$(RUN) tools/run_tests.py check

matrix: setup  ## The live tests on QEMU 7.2 (or this machine's), 10.x and 11.x, as a table
	@$(RUN) tools/run_tests.py matrix --qemu '$(strip $(QEMU))' -- $(ARGS)

soak: setup  ## The long tests, whole; goes on where it was interrupted
	@$(RUN) tools/soak.py --qemu '$(strip $(QEMU))' $(ARGS)

fuzz: setup  ## Fuzz what reads others' words; ARGS='TARGET --count 1000000 --seed 2'
	@$(RUN) -c 'import atheris' 2>/dev/null || $(RUN) -m pip install -q \
	  --disable-pip-version-check -c tools/constraints.txt --no-build-isolation \
	  --config-settings editable_mode=compat -e '.[fuzz]'
	@$(RUN) tests/fuzz $(ARGS)

bench: setup  ## Measure against nbdinfo, qemu-img, QEMU's own jobs and bare QMP, in turn
	@$(RUN) -m bench $(ARGS)

firmware: setup  ## Rebuild the tiny guest's ROM from its sources
	@$(MAKE) --no-print-directory -C qmpblock/testing/firmware

clean:  ## Remove what make and the tools left in this folder (not the cache of QEMUs)
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
