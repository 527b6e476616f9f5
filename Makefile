# Thin doors; each makes its own .venv where that is missing or older than what it is made from.
#   make run  [ARGS="--only 07 08"]     the course, in minutes      (build/quick/)
#   make test                           the tests
#   make lab                            Jupyter, in notebooks/
#   make book                           the course as a site and a PDF      (build/book/)
#   make full                           everything at its reported size: rewrites notebooks/, figures/, results/
PYTHON ?= python3
VENV ?= .venv

run: $(VENV)/ready
	$(VENV)/bin/python -m fcnn_utils run $(ARGS)

test: $(VENV)/ready
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest -m timed $(ARGS) || test $$? = 5  # 5: ARGS names none of these
	$(VENV)/bin/python -m pytest -m "not timed" --numprocesses=logical --maxprocesses=4 --dist=loadfile \
		--no-loadscope-reorder $(ARGS)

lab: $(VENV)/ready
	$(VENV)/bin/jupyter lab notebooks

book: $(VENV)/ready
	$(VENV)/bin/python book/build.py

full: $(VENV)/ready
	$(VENV)/bin/python -m fcnn_utils run --profile full $(ARGS)

$(VENV)/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements.lock
	$(VENV)/bin/pip install --quiet --no-deps --editable .
	touch $@

.PHONY: run test lab book full
