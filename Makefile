# make help lists the targets. Everything is installed into .venv, nothing outside this folder.
PYTHON ?= python3
VENV ?= .venv
# Where torch comes from, if not from the default index; on Linux without a GPU, for example:
#   make book TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# reproducing stores timings, which differ from run to run, and is executed only when named
CHAPTERS ?= 01-two-variances 02-infinite-width 03-finite-width 04-batchnorm 05-training 06-your-network index

export PATH := $(abspath $(VENV))/bin:$(PATH)
INSTALLED := $(VENV)/installed
SITE := _build/html/index.html

.DEFAULT_GOAL := help
.PHONY: help install book test lint unit chapters site notebooks lab serve clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /: /' | while IFS=: read -r name text; do printf '%-10s%s\n' "$$name" "$$text"; done

install: $(INSTALLED)  ## make .venv with the pinned versions

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	python -m pip install --quiet --constraint constraints.txt --editable '.[book,test,cluster,models]'
	touch $@

book: $(INSTALLED)  ## build the site
	jupyter-book build .
	@echo "The book: file://$(abspath $(SITE))"

test: lint site unit chapters  ## verify everything

lint: $(INSTALLED)  ## check style and types
	ruff check .
	ruff format --check .
	mypy

site: $(INSTALLED)  ## build the site anew, warnings are errors
	rm -rf _build
	jupyter-book build . -W -n --keep-going

unit: $(INSTALLED)  ## test the library and the built site
	OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadfile  # one thread per worker, or they wait for each other

chapters: $(INSTALLED)  ## run every chapter and compare with its stored outputs
	python -m pytest --nbval book/

notebooks: $(INSTALLED)  ## execute the chapters, store outputs, claims and the README's table
	for chapter in $(CHAPTERS); do \
	  echo "$$chapter"; \
	  SVLIB_STORE=1 jupyter nbconvert --to notebook --execute --inplace --log-level=ERROR \
	    --ExecutePreprocessor.record_timing=False book/$$chapter.ipynb || exit 1; \
	done
	python book/claims.py

lab: $(INSTALLED)  ## open the chapters in JupyterLab
	jupyter lab --notebook-dir book

serve: book  ## build the site and serve it on this machine, port 8000
	python -m http.server --bind 127.0.0.1 --directory _build/html 8000

clean:  ## remove the site and the environment
	rm -rf _build $(VENV) svlib.egg-info .pytest_cache .mypy_cache .ruff_cache
