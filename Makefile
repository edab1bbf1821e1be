# Everything on a fresh machine: `make demo` runs the main job on the embedded model and text, `make test` the tests.
VENV := .venv
PYTHON ?= python3

.PHONY: demo test test-slow check docs format clean

demo: $(VENV)/.installed
	$(VENV)/bin/qpruner fit --config configs/quickstart.yaml
	$(VENV)/bin/python scripts/tell_story.py runs/quickstart/model

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses=auto -m "not slow"

# What `test` leaves out: further kills and configurations, and 1,900 more files damaged in every way that one can be.
test-slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses=auto -m slow

check: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(MAKE) docs
	$(MAKE) test

# Pages of docs/, as HTML in build/site; a link or a name of the code that is not there is an error. Not with --quiet:
# warnings that are not said are not counted by --strict.
docs: $(VENV)/.docs-installed
	$(VENV)/bin/mkdocs build --strict

format: $(VENV)/.installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

$(VENV)/.installed: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

# Apart, so that `test` and `demo` do not wait for what they do not need.
$(VENV)/.docs-installed: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
