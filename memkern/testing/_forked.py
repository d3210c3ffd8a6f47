"""Runs pytest again and again in forks of one process, which has imported what takes long: torch and triton.

A line of standard input is one run: its arguments as a JSON list. A line of standard output answers it: the exit code
and what was said.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

import pytest
import torch._dynamo  # noqa: F401
import triton.runtime.interpreter  # noqa: F401


def fork(arguments: list[str]) -> tuple[int, str]:
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            code = 3  # pytest's number for an error of its own
            try:
                code = int(pytest.main(arguments))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return code, said.read()


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    for line in sys.stdin:
        print(json.dumps(fork(json.loads(line))), flush=True)
