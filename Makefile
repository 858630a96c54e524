# `make demo` and `make test` need Python with pip and venv, make and a package index; they build .venv themselves.
# Which Python builds it: make PYTHON=python3.12 test. Which index serves it: pip's own variables (CONTRIBUTING.md).
PYTHON ?= python3
BIN := .venv/bin
BUILT := .venv/.built
OLD := lit_sparse needs Python 3.11 to 3.13, and $(PYTHON) is another: name one, as in `make PYTHON=python3.12 test`

.PHONY: help demo test oldest check gpu bench quality fuzz faults readme docs docs-run dist assets format
help:     ## list the targets
	@sed -n 's/^\([a-z-]*\): .*## /make \1\t/p' Makefile

demo: $(BUILT)     ## fine-tune the demo model on the demo data, a few minutes on a laptop
	$(BIN)/lit-sparse fit --config smt.yaml --config trainers/demo.yaml

test: $(BUILT)     ## all tests but the long campaigns, in as many processes as WORKERS says (2), each with one thread
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(or $(WORKERS),2) --dist loadfile --no-loadscope-reorder $(ARGS)

oldest:     ## the tests with the oldest supported versions (make PYTHON=python3.12 oldest), in an environment of its own
	test -e .venv-oldest || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --editable '.[dev]' --constraint constraints-oldest.txt
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -m "not slow" -n $(or $(WORKERS),2) --dist loadfile \
	  --no-loadscope-reorder -W ignore::DeprecationWarning -W ignore::FutureWarning $(ARGS)

check: $(BUILT)     ## style, format, types, the generated tables, and the documentation's links
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	test ! -e benchmarks/readme.py || $(BIN)/python benchmarks/readme.py --check
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

gpu:     ## what needs a CUDA device: tests, kernels, methods; the interpreter at hand runs it (ARGS="--minutes 9")
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu --results benchmarks/results $(ARGS)

bench: $(BUILT)     ## measure memory and speed beside the peers, into benchmarks/results
	$(BIN)/python -m benchmarks.peers $(ARGS)

quality: $(BUILT)     ## fill a quality table (TABLE=blocks_0.84) for MINUTES, as long as something is left to do
	$(BIN)/python -m benchmarks.quality $(or $(TABLE),blocks_0.84) --minutes $(or $(MINUTES),60)

fuzz: $(BUILT)     ## stop and resume random fits of METHODS (all by default), EXAMPLES of each (200)
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels:profiling $(BIN)/python -m tests.fuzz $(METHODS) --examples $(or $(EXAMPLES),200)

faults: $(BUILT)     ## kill, damage and starve fits and files at random (KINDS="kills=100 damage"); two hours, goes on where it was
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels:profiling $(BIN)/python -m tests.faults $(KINDS)

readme: $(BUILT)     ## write the generated tables, pages and figures
	$(BIN)/python benchmarks/readme.py
	$(BIN)/python -m benchmarks.plots

docs: $(BUILT)     ## build the documentation's site into docs/_build, warnings as errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

dist:     ## build the wheel and the source distribution into dist/, and check them as PyPI does
	test -e .venv-dist || { $(PYTHON) -m venv .venv-dist && .venv-dist/bin/python -m pip install --quiet build twine; }
	rm -rf dist build
	.venv-dist/bin/python -m build --outdir dist .
	.venv-dist/bin/python -m twine check --strict dist/*

docs-run: $(BUILT)     ## run every command of README.md and docs/ on tiny models
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_documented_commands.py $(ARGS)

assets: $(BUILT)     ## bring the demo models and data into the cache
	$(BIN)/python -c "from lit_sparse import demo as d; \
	print(d.model_folder(), d.dataset_file('gsm8k').parent, d.encoder_folder(), d.labelled_file().parent)"

format: $(BUILT)     ## sort imports, mend what ruff can, and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The stamp is written last and taken away first, so a .venv without it was never finished and is built anew. One that
# was finished is only brought up to date when pyproject.toml or constraints.txt changed.
$(BUILT): pyproject.toml constraints.txt
	@test -e $@ || $(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" || { echo '$(OLD)' >&2; exit 1; }
	test -e $@ || $(PYTHON) -m venv --clear .venv
	rm -f $@
	$(BIN)/python -m pip install --editable '.[dev]' --constraint constraints.txt
	touch $@
