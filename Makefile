# Short names for the usual commands. Each makes .venv first if it is missing or older than requirements.lock or
# pyproject.toml. ARGS is passed on.
#   make run  [ARGS="--only 11 14"]     execute the course in minutes; writes build/quick/
#   make test [ARGS="tests/test_X.py"]  lint and the usual tests
#   make test-full                      the usual tests and those that take long: solutions, large networks, the book
#   make bench                          the tests that measure time or memory; run nothing beside them
#   make lab                            Jupyter, at notebooks/00_start_here.ipynb
#   make book                           render the course as a site and a PDF; writes build/book/
#   make book-serve                     serve the site on this machine only, at the address that it prints
#   make full                           everything at its reported size; rewrites notebooks/, figures/, results/
PYTHON ?= python3
VENV ?= .venv
PYTEST = $(VENV)/bin/python -m pytest
# As many workers as processors, but at most 4: each loads TensorFlow. The tests of one file share a worker, and so its
# fixtures; each group of notebooks may have its own. The notebooks, which take longest, come first (tests/conftest.py).
PARALLEL = --numprocesses=logical --maxprocesses=4 --dist=loadscope --no-loadscope-reorder

run: $(VENV)/ready
	$(VENV)/bin/python -m fcnn_utils run $(ARGS)

test: lint
	$(PYTEST) -m "not bench and not full" $(PARALLEL) $(ARGS)

test-full: lint
	$(PYTEST) -m "not bench" $(PARALLEL) $(ARGS)

bench: $(VENV)/ready
	$(PYTEST) -m bench $(ARGS)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

lab: $(VENV)/ready
	$(VENV)/bin/jupyter lab --ServerApp.root_dir=. notebooks/00_start_here.ipynb $(ARGS)

book: $(VENV)/ready
	$(VENV)/bin/python book/build.py

book-serve: $(VENV)/ready build/book/html/index.html
	$(VENV)/bin/python -m http.server --bind 127.0.0.1 --directory build/book/html 8000

build/book/html/index.html:
	$(MAKE) book

full: $(VENV)/ready
	$(VENV)/bin/python -m fcnn_utils run --profile full $(ARGS)

$(VENV)/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements.lock
	$(VENV)/bin/pip install --quiet --no-deps --editable .
	touch $@

.PHONY: run test test-full bench lint lab book book-serve full
