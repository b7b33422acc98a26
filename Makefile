# `make demo` and `make test` do all the set-up they need (tools/setup_env.py says how) and are safe to interrupt.
# PYTHON=/path/to/python, an active environment, STACK=onedl and TORCH=2.10.0 are respected.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-thorough test-pythons test-slow lint docs doctor clean

# A Python that works (pyenv shims may exist and fail) runs the set-up, which then chooses the environment.
BOOT = $(or $(shell for p in $(PYTHON) python3.11 python3.12 python3.10 python3.13 python3.14 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo "$$p" && break; done),$(error \
	No working Python 3.10 to 3.14 was found; install one (Debian, Ubuntu: apt install python3 python3-venv python3-dev)))
RUN = @$(BOOT) tools/setup_env.py

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup:  ## only the set-up
	$(RUN)

demo:  ## quantize the embedded detector and show what it cost
	$(RUN) tools/ptq.py configs/ssdlite_mbv2_ptq.py --preset w8a8_observe

test:  ## run the tests
	$(RUN) -m pytest -n 2 --dist loadfile

test-thorough:  ## run what `make test` leaves out: more of the same kinds, minutes
	$(RUN) -m pytest -n 2 --dist loadfile -m thorough

test-pythons:  ## set up and run the demo with the oldest and the newest Python of this machine
	@$(BOOT) tools/try_pythons.py

test-slow:  ## run all tests, those that take hours, too
	$(RUN) -m pytest -m ''

lint:  ## check the style
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

docs: export REPO_URL ?= $(shell git remote get-url origin 2>/dev/null | \
	sed -n 's,^git@\([^:]*\):,https://\1/,; s,\.git$$,,; /^https:/p')
docs:  ## build the documentation into site/
	$(RUN) -m pip install --quiet mkdocs-material
	$(RUN) -m mkdocs build --strict

doctor:  ## say what is wrong with the environment and how to mend it
	$(RUN) tools/doctor.py

clean:  ## remove what was built; the environment (.venv) and the results (work_dirs) stay
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
