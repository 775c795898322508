# The whole developer interface. Every target makes .venv first when it is missing or out of date.
.PHONY: setup demo test check docs test-slow test-teacher test-gpu

export OMP_NUM_THREADS ?= 1
unexport PYTHONDONTWRITEBYTECODE  # without compiled files megatron-core takes ten seconds to import
bin := .venv/bin
pytest := $(bin)/python -m pytest

setup:    ## make .venv (idempotent)
	@scripts/setup.sh

demo: setup    ## teacher, three stages, report: on a laptop
	@env -u OMP_NUM_THREADS $(bin)/vpmoe demo

test: setup    ## every test that needs neither a GPU nor patience
	@$(pytest) -q -rs -n 2 --dist loadfile --durations=10

check: setup    ## format, lint, types, imports, generated pages
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/pyright
	$(bin)/lint-imports
	$(bin)/python scripts/docs.py --check
	$(bin)/python scripts/performance.py --check
	$(bin)/python scripts/full_student.py --check
	$(bin)/python scripts/targets_page.py --check

docs: setup    ## write the generated pages
	@$(bin)/python scripts/docs.py
	@$(bin)/python scripts/performance.py
	@$(bin)/python scripts/full_student.py
	@$(bin)/python scripts/targets_page.py

test-slow: setup    ## tests over ten seconds, random kills among them
	@$(pytest) -q -m "slow and not gpu and not multi_gpu and not network"

test-teacher: setup    ## tests against a real vLLM server, on a CPU, in an environment of its own
	@scripts/setup_teacher.sh
	@$(pytest) -q -m teacher_server

test-gpu: setup    ## tests that need one GPU; with more, also the ones that need several
	@mkdir -p reports
	@$(pytest) -q -m "gpu or multi_gpu" --junitxml=reports/gpu-tests.xml; status=$$?; \
		$(bin)/python scripts/gpu_tests.py reports/gpu-tests.xml; exit $$status
