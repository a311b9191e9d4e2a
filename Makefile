VENV := .venv
PY := $(VENV)/bin/python

.PHONY: check test-fast
$(VENV)/ready: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

check: $(VENV)/ready
	$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check . && $(VENV)/bin/mypy && $(VENV)/bin/lint-imports

test-fast: $(VENV)/ready
	$(PY) -m pytest -q -m "not kafka and not server and not browser"
