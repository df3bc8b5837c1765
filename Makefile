PYTHON ?= python3
VENV ?= .venv
EXAMPLE = examples/novel16
OUT ?= out/novel16-30

# One stamp for the installation: made anew when what it installs changes.
INSTALLED = $(VENV)/.installed

.PHONY: demo test check slow clean

# Prune the shipped model at 30 % on its own text and print what it cost.
demo: $(INSTALLED)
	$(VENV)/bin/flexigpt prune $(EXAMPLE) $(OUT) --ratio 0.3 --calibration $(EXAMPLE)/calibration.jsonl --perplexity $(EXAMPLE)/validation.jsonl --window-length 256 --overwrite

# Everything that has to pass before a change lands.
test: check
	$(VENV)/bin/pytest -n 2 --dist loadgroup

check: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The tests that take minutes each.
slow: $(INSTALLED)
	$(VENV)/bin/pytest -m slow

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) out
