#!/usr/bin/env bash
# Installs the project with its test tools, then lint, format, types and tests. Arguments go to pytest.
# Usage: scripts/test.sh [--all] [PYTEST_ARGUMENT ...]      e.g. scripts/test.sh --all tests/model
# --all runs the tests marked slow too, as continuous integration does. One process a core runs tests; -n 0 runs them in one.
# Every check runs even when one before it failed; the exit code is that of the first that failed.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
tests=(-m 'not slow')
if [ "${1:-}" = --all ]; then
    shift
    tests=()
fi
bash scripts/install.sh test
# A machine without network tests everything else: the tests of the trained model then say that they are skipped.
bash scripts/fetch_demo_model.sh || printf 'test: no trained model could be fetched; its tests will be skipped\n' >&2

status=0
failed=()
check() {
    local name="$1" code=0
    shift
    printf '== %s\n' "$name"
    .venv/bin/python -m "$@" || code=$?
    if [ "$code" -ne 0 ]; then
        failed+=("$name")
        [ "$status" -ne 0 ] || status=$code
    fi
}

check 'ruff check' ruff check .
check 'ruff format --check' ruff format --check .
check 'mypy' mypy
# Each process keeps to a run of neighbouring tests, which share fixtures, and takes over from another when it has no more.
check 'pytest' pytest -n auto --maxprocesses 16 --dist worksteal ${tests[@]+"${tests[@]}"} "$@"

if [ "${#failed[@]}" -gt 0 ]; then
    printf 'test: failed: %s\n' "$(printf '%s, ' "${failed[@]}" | sed 's/, $//')" >&2
fi
exit "$status"
