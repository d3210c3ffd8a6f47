"""What fixes the operators of a compiled library, as one number. Standard library alone: setup.py runs it too."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path


def interface(csrc: Path, library: str) -> str | None:
    """Hash over the sources that bind ``_ops_<library>`` to torch; None where they are not (an installed wheel)."""
    paths = sorted([*(csrc / f"bind_{library}").glob("*.[ch]*"), *(csrc / "common").glob("binding*.h")])
    if not (csrc / f"bind_{library}").is_dir():
        return None
    digest = sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
