# make quickstart: install into .venv; train a small localized GPT-2 on the sample text, make a page
#                  to look at, and measure what locality costs in which layers
# make replicate:  the paper's table with GPT-2 on a GPU: docs/REPLICATE.md. ARGS=--quick rehearses it
# make test:       install what the tests need as well; check the format; run the tests
PYTHON ?= python3

quickstart: .venv/run-time
	.venv/bin/python train.py configs/quickstart.toml --overwrite
	.venv/bin/python view.py runs/quickstart
	.venv/bin/python eval.py runs/quickstart --partition window:8 --dial-sweep --floor 1 --stride 100 \
		--figure runs/quickstart/dials.png

replicate: .venv/run-time
	.venv/bin/python -m experiments.replicate $(ARGS)

test: .venv/tests
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/python -m pytest -q -n 2 --dist loadfile tests

format: .venv/tests
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv .venv

.venv/run-time: requirements.txt | .venv/bin/pip
	.venv/bin/pip install --quiet -r requirements.txt
	@touch $@

.venv/tests: requirements-test.txt .venv/run-time
	.venv/bin/pip install --quiet -r requirements-test.txt
	@touch $@

.PHONY: quickstart replicate test format
