#!/usr/bin/env bash
# Makes the environment that the Makefile's targets run in: make_env.sh FOLDER.
#
#   PYTHON       the Python to start from (python3); if it can import torch, that one is used and no network is needed
#   TORCH_INDEX  an additional package index to look for torch in, such as PyTorch's own index of CPU wheels
#   CI=true      a check that cannot be installed is an error, where it is otherwise skipped by name
#
# What pip says goes to FOLDER/setup.log.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: make_env.sh FOLDER}
python=${PYTHON:-python3}
second_triton=3.6.0  # kernels are compiled ahead of time with this one too; the first is what torch or we ask for
first_triton=3.9.0

say() { printf 'environment: %s\n' "$*"; }
fail() { printf 'environment: %s\n' "$*" >&2; exit 1; }

# -- what the machine has to bring --------------------------------------------------------------------------------
missing=()
have_python=yes
command -v "$python" >/dev/null 2>&1 || { missing+=(python3 python3-venv python3-dev); have_python=no; }
if [ $have_python = yes ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail \
    "$python is $("$python" --version 2>&1), memkern needs 3.11 or newer; name another one with make PYTHON=python3.12 ..."
  existing=$("$python" -c '
import re, torch
if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= (2, 11):
    print(torch.__version__)' 2>/dev/null || true)
  own_pip=$("$python" -c 'import importlib.util as u; print("yes" if u.find_spec("pip") else "no")')
  if [ -z "$existing" ] || [ "$own_pip" = no ]; then
    "$python" -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
  fi
  [ -f "$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h" ] ||
    missing+=(python3-dev)
fi
command -v "${CXX:-c++}" >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || missing+=(g++)
command -v make >/dev/null 2>&1 || missing+=(make)
[ ${#missing[@]} = 0 ] || fail "missing here; on Debian: apt-get install ${missing[*]}"

# -- the folder ---------------------------------------------------------------------------------------------------
if [ ! -x "$venv/bin/python" ]; then
  say "making $venv from $("$python" --version 2>&1)"
  if [ -n "$existing" ] && [ "$own_pip" = yes ]; then
    "$python" -m venv --without-pip "$venv"
  else
    "$python" -m venv "$venv"
  fi
fi
in_venv=$(cd "$venv" && pwd)/bin/python
log=$venv/setup.log
: >"$log"
if [ -n "$existing" ]; then
  # --system-site-packages would show the packages of the system's Python, not those of a venv we start from.
  "$python" -c '
import sys
print("\n".join(p for p in sys.path if p.rstrip("/").endswith(("site-packages", "dist-packages"))))' \
    >"$("$in_venv" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/_memkern_parent.pth"
fi

# One unreachable index must not cost minutes; a slow but working one gets its time.
install() {
  printf '\n$ pip install %s\n' "$*" >>"$log"
  "$in_venv" -m pip --disable-pip-version-check install --retries 1 "$@" >>"$log" 2>&1
}

# -- torch --------------------------------------------------------------------------------------------------------
torch_version() { "$in_venv" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true; }
if [ -n "$existing" ]; then
  say "using torch $existing of $python"
elif [ -z "$(torch_version)" ]; then
  say "installing torch (log: $log)"
  index=()
  [ -z "${TORCH_INDEX:-}" ] || index=(--extra-index-url "$TORCH_INDEX")
  if nvidia-smi -L >/dev/null 2>&1; then
    install torch ${index[@]+"${index[@]}"} || fail "torch cannot be installed; see $log"
  elif ! install "torch==2.13.0+cpu" ${index[@]+"${index[@]}"}; then
    say "no CPU build of torch is on the configured package index: installing the default build, which may bring"
    say "gigabytes of CUDA libraries (TORCH_INDEX=URL of PyTorch's CPU wheel index avoids that)"
    install torch ${index[@]+"${index[@]}"} || fail "torch cannot be installed; see $log"
  fi
fi
# Nothing below may move torch.
constraints=$venv/constraints.txt
echo "torch==$(torch_version)" >"$constraints"

# -- the rest: all at once, and where that fails (offline, say) one by one ----------------------------------------
if [ -z "$("$in_venv" -c 'import importlib.util as u; print(u.find_spec("triton") or "")')" ]; then
  wanted=$("$in_venv" -c '
import re
from importlib.metadata import requires
pins = [m[1] for r in requires("torch") or [] if (m := re.match(r"triton\s*\(?==\s*([\w.+]+)", r))]
print(pins[0] if pins else "")' 2>/dev/null || true)
  wanted=${wanted:-$first_triton}
  install -c "$constraints" "triton==$wanted" || say "triton $wanted cannot be installed here"
fi
groups=(build run dev models plot)
mapfile -t needed < <("$in_venv" scripts/missing.py "${groups[@]}" | grep -v -E '^(triton|torch)\b')
if [ ${#needed[@]} -gt 0 ]; then
  say "installing ${needed[*]}"
  if ! install -c "$constraints" "${needed[@]}"; then
    for requirement in "${needed[@]}"; do
      install --retries 0 --timeout 10 -c "$constraints" "$requirement" || true
    done
  fi
fi

triton=$("$in_venv" -c 'from importlib.metadata import version; print(version("triton"))' 2>/dev/null || true)
second_missing() { [ "${triton%.*}" != "${second_triton%.*}" ] && [ ! -d "$venv/triton36/triton" ]; }
if second_missing; then
  say "installing a second triton, $second_triton, for ahead-of-time checks"
  install --retries 0 --no-deps --target "$venv/triton36" "triton==$second_triton" || rm -rf "$venv/triton36"
fi

# -- what could not be had ----------------------------------------------------------------------------------------
without=$("$in_venv" scripts/missing.py build run | grep -v -E '^triton\b' | paste -sd ' ' || true)
[ -z "$without" ] || fail "cannot be installed, and nothing works without: $without (see $log)"
"$in_venv" -c 'import pytest' 2>/dev/null || fail "pytest cannot be installed (see $log)"
without=$({ "$in_venv" scripts/missing.py "${groups[@]}"
            ! second_missing || echo "triton==$second_triton"; } | grep . | paste -sd ' ' || true)
if [ -n "$without" ]; then
  [ "${CI:-}" != true ] || fail "CI=true, but these cannot be installed: $without (see $log)"
  say "without $without (not to be had here): checks and tests that need one of these are skipped"
fi
say "ready: $("$in_venv" --version), torch $(torch_version), triton ${triton:-none}"
