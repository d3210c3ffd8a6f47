#!/usr/bin/env bash
# The suite: test.sh PYTHON [pytest arguments]. As many workers as there are cores, where xdist is there.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: test.sh PYTHON [pytest arguments]}
shift
unset PYTHONDONTWRITEBYTECODE  # many tests start a Python of their own
workers=()
if "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('xdist') is None)"; then
  workers=(-n auto --dist worksteal)
fi
second=$(dirname "$(dirname "$python")")/triton36
MEMKERN_TRITON_ALT=$(cd "$second" 2>/dev/null && pwd || true) \
  exec "$python" -m pytest ${workers[@]+"${workers[@]}"} "$@"
