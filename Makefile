# make demo | test | lab | bench | torture: each sets up .venv by itself
PYTHON ?= python3
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
export SCANLIB_FAST ?=

.PHONY: demo test lab bench torture browser checkpoints links clean

demo: .venv/installed                ## execute the quickstart and leave its page and picture in out/
	$(BIN)/python -m nbconvert --to html --execute notebooks/00_quickstart.ipynb --output-dir out --output quickstart --log-level WARN
	$(BIN)/python -c "print(open('out/quickstart.txt').read())"

test: export SCANLIB_FAST = 1
test: .venv/installed-test           ## ruff, mypy, the tests, and every notebook
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest tests
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=600 notebooks

lab: .venv/installed                 ## JupyterLab on the notebooks
	$(BIN)/python -m jupyterlab notebooks

bench: .venv/installed-test          ## beside the straightforward way and the peers; writes benchmarks/RESULTS.md, PEERS.md, EXPLORER.md
	$(BIN)/python benchmarks/core.py
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/explorer.py

torture: .venv/installed-test        ## try to break it for 20 minutes: kills, damaged files, threads, interrupts; writes benchmarks/FAULTS.md
	$(BIN)/python benchmarks/torture.py

checkpoints: .venv/installed         ## train what ships in data/checkpoints
	$(BIN)/python data/make_checkpoints.py

links: .venv/installed               ## rewrite every badge and link after the address in pyproject.toml changed
	$(BIN)/python tests/links.py

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	@$(BIN)/python -c "open('$@', 'w')"

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[test,peers,photos]"
	@$(BIN)/python -c "open('$@', 'w')"

browser: .venv/installed-test        ## the explorer in JupyterLab and Voila, driven in a Chromium that you have; screenshots in out/
	$(BIN)/python -m pip install --quiet --editable ".[browser]"
	SCANLIB_BROWSER=1 $(BIN)/python -m pytest tests/explorer/test_browser.py -rs

clean:
	$(PYTHON) -c "import shutil; [shutil.rmtree(d, True) for d in ('.venv', 'out', 'build', '.pytest_cache', '.ruff_cache', '.mypy_cache')]"
