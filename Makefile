# make demo   install the runtime into .venv and label one street photo
# make test   install everything into .venv and run the tests
# make lint   style, types and layers
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
CAMVID_PHOTO := ../shared/data/camvid/images/test/Seq05VD_f02340.jpg
IMAGE ?= $(wildcard $(CAMVID_PHOTO))

.PHONY: demo test lint clean

$(VENV)/.runtime: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.train: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[train,dev]"
	touch $@ $(VENV)/.runtime

demo: $(VENV)/.runtime
	@if [ -n "$(IMAGE)" ]; then photo="$(IMAGE)"; else \
	    $(BIN)/denselab data scenes -o out/scene --count 1 --size 960x720 --overwrite && photo=out/scene/images; fi; \
	$(BIN)/denselab predict "$$photo" -o out/demo --overwrite

test: $(VENV)/.train
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(VENV)/.train
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) out runs
