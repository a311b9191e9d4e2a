# Each target makes .venv with the pinned dependencies if it is missing; nothing has to be set up before.
VENV := .venv
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest -q
# Two processes, each with servers of its own, share the test files; ARGS="-n 0" makes it one.
TWO := -n 2 --dist loadfile

.PHONY: demo test check test-fast test-server test-kafka test-browser simulate simulate-mutants chaos fuzz bench profile format clean

$(VENV)/ready: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/ready   ## the main job on real input on this machine alone; ARGS=--exit leaves when it is done
	$(PY) -m demo $(ARGS)

test: $(VENV)/ready   ## everything
	$(MAKE) --no-print-directory check
	$(PYTEST) $(TWO) $(ARGS)

check: $(VENV)/ready  ## formatter, linter, type checker, layers
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo 2>/dev/null || $(VENV)/bin/lint-imports

test-fast: $(VENV)/ready  ## units and properties; no server, under 60 s
	$(PYTEST) $(TWO) -m "not kafka and not server and not browser and not slow" $(ARGS)

test-server: $(VENV)/ready  ## contract suites and more on a real Postgres and Redis/Valkey
	$(PYTEST) -m "server and not kafka" $(ARGS)

test-kafka: $(VENV)/ready   ## on a real Apache Kafka that the tests start, or on KAFKA_BOOTSTRAP
	$(PYTEST) -m kafka $(ARGS)

test-browser: $(VENV)/ready
	$(PYTEST) -m browser $(ARGS)

SECONDS := 120
SEED := 1
chaos: $(VENV)/ready   ## a real Kafka, Redis, Postgres and three workers, killed and paused at random: equal to the oracle
	$(PY) -m chaos --seconds $(SECONDS) --seed $(SEED) $(ARGS)

simulate: $(VENV)/ready  ## SEEDS runs from FROM on in virtual time, each with faults of its own
	$(PY) -m simulation --seeds $(or $(SEEDS),1000) --from $(or $(FROM),0) $(if $(MUTANT),--mutant $(MUTANT)) $(ARGS)

simulate-mutants: $(VENV)/ready  ## deliberate breaks of the protocol, one at a time: each must be caught
	$(PY) -m simulation.hunt $(ARGS)

fuzz: $(VENV)/ready  ## RECORDS mutated records from SEED on, and record sets: the kernels against their plain twins
	$(PY) -m fuzz --records $(or $(RECORDS),10000000) --seed $(SEED) $(ARGS)

bench: $(VENV)/ready  ## every benchmark, then the peers on the same jobs, appended to benchmarks/results.jsonl
	$(PY) -m benchmarks all --transport all --append $(ARGS)
	$(PY) -m benchmarks peers --append $(PEERS)

profile: $(VENV)/ready  ## where the time goes: each step of pipeline and agent in µs a record, and flame graphs in .run/profile
	$(PY) -m benchmarks profile --transport kafka $(ARGS)

format: $(VENV)/ready
	$(VENV)/bin/ruff format --quiet . && $(VENV)/bin/ruff check --quiet --fix .

clean:
	rm -rf $(VENV) .run build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
