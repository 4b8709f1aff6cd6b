# make help lists the targets. Everything is installed into .venv, nothing outside this folder.
PYTHON ?= python3
VENV ?= .venv
# Where torch comes from, if not from the default index; on Linux without a GPU, for example:
#   make book TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
CONSTRAINTS ?= constraints.txt
EXTRAS ?= book,test,cluster,models
# reproducing stores timings, which differ from run to run, and is executed only when named
CHAPTERS ?= 01-two-variances 02-infinite-width 03-finite-width 04-batchnorm 05-training 06-your-network 07-beyond appendix-drawing appendix-figure appendix-law appendix-angles appendix-drift appendix-runs appendix-architectures index claims

export PATH := $(abspath $(VENV))/bin:$(PATH)
INSTALLED := $(VENV)/installed
PIP := python -m pip install --disable-pip-version-check --constraint $(CONSTRAINTS)
SITE := _build/html/index.html

.DEFAULT_GOAL := help
.PHONY: help install book test verify lint unit slow chapters site notebooks pdf lab serve clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /: /' | while IFS=: read -r name text; do printf '%-10s%s\n' "$$name" "$$text"; done

install: $(INSTALLED)  ## make .venv with the pinned versions

# pip takes torch, because uv does not read pip's settings and would take the one with CUDA; uv takes
# the rest, in seconds, or pip in minutes where uv does not work. From its own index torch comes
# without what it depends on: that index lacks other pinned versions.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP) --no-deps --index-url $(TORCH_INDEX) torch)
	$(PIP) torch uv
	VIRTUAL_ENV=$(abspath $(VENV)) uv pip install --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]' \
	  || $(PIP) --editable '.[$(EXTRAS)]'
	touch $@

book: $(INSTALLED)  ## build the site
	jupyter-book build .
	@echo "The book: file://$(abspath $(SITE))"

test: lint site  ## decide: style, types, site, units and chapters, in some nine minutes
	$(PYTEST) -m "not slow and not lab"
	$(PYTEST) --dist loadfile --nbval --nbval-current-env book/

verify: slow  ## what takes long besides: all pages, all digits, killed runs, the wheel, JupyterLab
	OMP_NUM_THREADS=1 python -m pytest -m lab tests/site

lint: $(INSTALLED)  ## check style and types
	ruff check .
	ruff format --check .
	mypy

site: $(INSTALLED)  ## build the site anew, warnings are errors
	rm -rf _build
	jupyter-book build . -W -n --keep-going

# one thread per worker, or they wait for each other
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n auto --dist worksteal

unit: $(INSTALLED)  ## test the library and the built site, without the slow tests
	$(PYTEST) -m "not slow and not lab"

slow: $(INSTALLED)  ## run the slow tests alone
	$(PYTEST) -m slow

chapters: $(INSTALLED)  ## run every chapter and compare with its stored outputs
	python -m pytest --nbval --nbval-current-env book/

notebooks: $(INSTALLED)  ## execute the chapters, store outputs, claims and the README's table
	for chapter in $(CHAPTERS); do \
	  echo "$$chapter"; \
	  SVLIB_STORE=1 jupyter nbconvert --to notebook --execute --inplace --log-level=ERROR \
	    --ExecutePreprocessor.record_timing=False book/$$chapter.ipynb || exit 1; \
	done
	python book/claims.py

pdf: $(INSTALLED)  ## print the whole book, _build/pdf (needs chromium)
	python book/print.py

lab: $(INSTALLED)  ## open the chapters in JupyterLab
	jupyter lab --notebook-dir book

serve: book  ## build the site and serve it on this machine, port 8000
	python -m http.server --bind 127.0.0.1 --directory _build/html 8000

clean:  ## remove the site and the environment
	rm -rf _build build $(VENV) svlib.egg-info .pytest_cache .mypy_cache .ruff_cache
