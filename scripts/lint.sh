#!/usr/bin/env bash
# ruff, mypy and import-linter: lint.sh PYTHON. One that is not installed is skipped by name, and an error with CI=true.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: lint.sh PYTHON}
failed=0

check() {  # check NAME MODULE COMMAND...
  local name=$1 module=$2
  shift 2
  if ! "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)"; then
    if [ "${CI:-}" = true ]; then
      echo "lint: $name FAILED: it is not installed, and CI=true" >&2
      failed=1
    else
      echo "lint: $name skipped: it is not installed in this environment"
    fi
  elif "$@"; then
    echo "lint: $name ok"
  else
    echo "lint: $name FAILED" >&2
    failed=1
  fi
}

check "ruff check" ruff "$python" -m ruff check -q .
check "ruff format" ruff "$python" -m ruff format --check -q .
check "mypy" mypy "$python" -m mypy --no-error-summary
check "import-linter" importlinter "$python" scripts/lint_imports.py
exit $failed
