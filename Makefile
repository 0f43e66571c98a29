# Two commands, each complete on a fresh clone: `make demo` and `make test`.
# They find a Python 3.12, make .venv with pinned packages (tools/constraints.txt) once, and run.

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
RUN := OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: demo test lint clean

demo: $(STAMP)
	$(RUN) $(PYTHON) examples/demo.py

test: lint
	$(RUN) $(PYTHON) -m pytest

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# A failed or interrupted installation leaves no stamp and is begun anew.
$(STAMP): setup.cfg pyproject.toml tools/constraints.txt tools/find_python.sh
	@python=$$(sh tools/find_python.sh) && "$$python" -m venv --clear $(VENV)
	@echo "Installing into $(VENV): torch and its CUDA libraries, about 5 GB, a few minutes. Once."
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c tools/constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV)
