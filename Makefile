# Every target sets up .venv by itself on a fresh machine; `make install` does only that.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= demo-run
# A CPU run shares its cores between ranks: one BLAS thread per rank unless the caller says otherwise.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: install demo test test-all lint bench clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and alone: the pin finds the right build, a later resolver run would not reconsider it
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/dist-cpt demo --out $(OUT)

test: install
	sh tests/slurm/install.sh
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0 -m "not matrix and not gpu" --durations=40

# All of it takes hours; SHARD=1/4 to 4/4 are its quarters.
test-all: install
	sh tests/slurm/install.sh
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0 -m "not gpu" --timeout=3600 -o faulthandler_timeout=3660 --durations=25

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: install
	$(BIN)/python benchmarks/data.py --write
	$(BIN)/python benchmarks/open_store.py --write
	$(BIN)/python benchmarks/load.py --write
	$(BIN)/python benchmarks/peers.py --write
	$(BIN)/python benchmarks/checkpoint.py --write
	$(BIN)/python benchmarks/kernels.py --device cpu --small --write

clean:
	rm -rf .venv demo-run .pytest_cache .ruff_cache .import_linter_cache
