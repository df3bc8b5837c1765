PYTHON ?= python3
VENV ?= .venv
EXAMPLE = examples/novel16
OUT ?= out/novel16-30
REAL = out/smollm2-135m
REAL_TOKENS ?= 61440
# The torch that `make test-latest` takes, such as torch==2.13.0: the newest may bring gigabytes for GPUs.
TORCH ?= torch

# One stamp for the installation: made again when what it installs changes.
INSTALLED = $(VENV)/.installed

.PHONY: demo real test check slow docs wheel test-lowest test-latest clean

# Prune the shipped model at 30 % on its own text and print what it cost.
demo: $(INSTALLED)
	$(VENV)/bin/flexigpt prune $(EXAMPLE) $(OUT) --ratio 0.3 --calibration $(EXAMPLE)/calibration.jsonl --perplexity $(EXAMPLE)/validation.jsonl --window-length 256 --overwrite

# The whole story on a real model, SmolLM2-135M: get it, prune it to 79 % of its parameters, measure, recover a little,
# measure again, report. Half an hour on two cores; see examples/smollm2.
real: $(INSTALLED)
	PYTHON=$(VENV)/bin/python examples/smollm2/get.sh $(REAL)
	$(VENV)/bin/python examples/smollm2/texts.py out/smollm2-texts
	$(VENV)/bin/flexigpt prune $(REAL) out/smollm2-79 --target-size 106.2M --calibration out/smollm2-texts/calibration.jsonl --perplexity out/smollm2-texts/novels.jsonl --window-length 256 --overwrite
	$(VENV)/bin/flexigpt recover out/smollm2-79 out/smollm2-79-recovered --teacher $(REAL) --data out/smollm2-texts/recovery.jsonl --tokens $(REAL_TOKENS) --batch-tokens 2048 --window-length 256 --lr 1e-3 --perplexity out/smollm2-texts/novels.jsonl --overwrite
	$(VENV)/bin/flexigpt eval out/smollm2-79-recovered out/smollm2-79 $(REAL) --perplexity out/smollm2-texts/technical.jsonl --window-length 256
	$(VENV)/bin/flexigpt report out/smollm2-79-recovered --out out/smollm2-79-report

# Everything that has to pass before a change lands.
test: check
	$(VENV)/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The tests that take minutes each.
slow: $(INSTALLED)
	$(VENV)/bin/pytest -m slow

# The site of the pages and the public names, in out/site; a link that leads nowhere is an error. flexigpt need not be installed.
docs:
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --constraint constraints.txt $$($(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

# Source and wheel, checked as the index would; and the wheel alone, in a fresh environment: it holds every file of the
# package, its types serve a user's mypy, and its commands run.
wheel:
	rm -rf .venv-wheel build dist out/wheel
	mkdir -p out
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip install --quiet --constraint constraints.txt build mypy twine
	.venv-wheel/bin/python -m build --outdir dist . > out/wheel.log
	.venv-wheel/bin/twine check --strict dist/*
	.venv-wheel/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	diff -r -x __pycache__ -x '*.egg-info' src/flexigpt .venv-wheel/lib/python3*/site-packages/flexigpt
	.venv-wheel/bin/mypy --config-file= --strict tests/typed_user.py
	.venv-wheel/bin/flexigpt --version --verbose
	.venv-wheel/bin/flexigpt prune $(EXAMPLE) out/wheel/pruned --ratio 0.2 --calibration $(EXAMPLE)/calibration.jsonl --windows 4 --window-length 256
	.venv-wheel/bin/flexigpt report out/wheel/pruned --out out/wheel/report

# The suite with the lowest version of each dependency that pyproject.toml allows; what old versions warn of is no error.
test-lowest:
	rm -rf .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	sed -n 's/^  "\(.*\)>=\(.*\)",$$/\1==\2/p' pyproject.toml > .venv-lowest/constraints.txt
	.venv-lowest/bin/pip install --quiet --constraint .venv-lowest/constraints.txt --editable '.[dev]'
	.venv-lowest/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder -W default

# The suite with what `pip install .` takes today.
test-latest:
	rm -rf .venv-latest
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/pip install --quiet '$(TORCH)' --editable '.[dev]'
	.venv-latest/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) .venv-* build dist out
