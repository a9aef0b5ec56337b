# Everything runs in .venv, made on first use: nothing has to be installed before.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
INSTALLED := .venv/installed
DEMO := out/demo
TYPED := build/typed

.PHONY: demo live test full bench figures docs lint typed clean

demo: $(INSTALLED)  ## export the demo model, render a prompt with it, write a report
	$(BIN)/packforcing export --model demo --out $(DEMO)/bundle
	$(BIN)/packforcing demo --bundle $(DEMO)/bundle --out $(DEMO)

live: $(INSTALLED)  ## open a page on which the demo model's video is steered while it is made
	test -f $(DEMO)/bundle/manifest.json || $(BIN)/packforcing export --model demo --out $(DEMO)/bundle
	$(BIN)/packforcing serve $(DEMO)/bundle --open

test: $(INSTALLED)  ## a process for each core; the tests of a file stay together
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadscope

full: $(INSTALLED)  ## the long proofs as well, hours; again: those that have not passed with this code
	$(BIN)/python -m pytest -m "" -p tests.full_run --durations=30

bench: $(INSTALLED)  ## the demo on this machine; with AGAINST=CHECKOUT, before and after in one run
	$(if $(AGAINST),$(BIN)/python -m benchmarks.against $(AGAINST),$(BIN)/packforcing bench)

figures: $(INSTALLED)  ## the numbers and pictures of README and docs, days; ARGS="--below 5" for some
	$(BIN)/python -m benchmarks.figures $(ARGS)

# The rooms come together as one package only when it is installed: links show tools the same.
typed:
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/packforcing
	@ln -s $(CURDIR)/packforcing/* $(CURDIR)/runtime $(CURDIR)/export $(CURDIR)/calibration \
	  $(CURDIR)/evaluation $(CURDIR)/app $(TYPED)/packforcing

lint: $(INSTALLED) typed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(TYPED) && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml packforcing
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/hadolint Dockerfile Dockerfile.gpu

docs: $(INSTALLED) typed  ## the site; broken links fail
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable ".[dev]"
	@touch $@
