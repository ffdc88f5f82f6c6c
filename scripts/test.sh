#!/usr/bin/env bash
# Everything that must pass before a commit: format, lint, types, tests. Needs only Python 3.11 to 3.14, and git.
#
#   bash scripts/test.sh                    the whole of it
#   bash scripts/test.sh tests/ops -k rope  the checks, then these tests
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
use_venv dev

ruff format --check .
ruff check .
pyright
# One file stays in one process, so that its fixtures and compiled programs are made once.
workers="$(python -c 'import os; print(min(len(os.sched_getaffinity(0)), 4))')"
pytest --numprocesses "$workers" --dist loadfile "$@"
