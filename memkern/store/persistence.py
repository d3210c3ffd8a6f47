"""How a store lies on disk, and why a crash cannot lose it.

A folder holds ``store.json`` (format version, settings, and the names, sizes and SHA-256 of the data files of its
generation), ``embeddings-<generation>.safetensors`` and ``records-<generation>.jsonl``. A save writes the new
generation beside the old one, flushes it to disk and then renames ``store.json`` into place: that one rename is the
save. Old generations are removed afterwards.
"""

from __future__ import annotations

import hashlib
import json
import mmap as memory_map
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VERSION = 1
MANIFEST = "store.json"
_DATA_FILE = re.compile(r"(embeddings|records)-(\d{8})-[0-9a-f]{8}\.(safetensors|jsonl)(\.tmp)?")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}


def save(
    folder: Path, *, settings: dict[str, Any], tensors: dict[str, Tensor], records: Iterable[dict[str, Any]]
) -> None:
    """Write a new generation and make it the current one.

    Raises:
        OSError: the disk is full or cannot be written; the previous save is untouched.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generation = 1 + max((int(match[2]) for match in map(_DATA_FILE.fullmatch, os.listdir(folder)) if match), default=0)
    # The random part keeps two processes that save at once out of each other's files.
    suffix = f"{generation:08d}-{secrets.token_hex(4)}"
    embeddings, lines = folder / f"embeddings-{suffix}.safetensors", folder / f"records-{suffix}.jsonl"
    manifest = folder / f"{MANIFEST}.{secrets.token_hex(4)}.tmp"
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, embeddings)
        with lines.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        described = {role: _describe(path) for role, path in (("embeddings", embeddings), ("records", lines))}
        content = {"format": "memkern.MemoryStore", "version": VERSION, "settings": settings, "files": described}
        manifest.write_text(json.dumps(content, indent=2), encoding="utf-8")
        for path in (embeddings, lines, manifest):
            _flush(path)
        os.replace(manifest, folder / MANIFEST)
    except (OSError, TypeError, ValueError) as error:
        for path in (embeddings, lines, manifest):
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"saving the store failed, the previous save is untouched: {error}") from error
        raise ValueError(f"metadata: cannot be written as JSON, the previous save is untouched: {error}") from error
    _flush(folder)
    for name in os.listdir(folder):
        match = _DATA_FILE.fullmatch(name)
        if match and int(match[2]) < generation:
            (folder / name).unlink(missing_ok=True)


def load(folder: Path, *, mmap: bool) -> tuple[dict[str, Any], dict[str, Tensor], list[dict[str, Any]]]:
    """Settings, tensors and records of the current generation; checksums are compared before anything is built.

    With ``mmap`` the embeddings are a private map of their file: only its size is compared, since reading it all for a
    checksum is what the map avoids.

    Raises:
        FileNotFoundError: there is no store. ValueError: a damaged or newer file, named.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"no memory store in {folder}: {MANIFEST} is missing")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, settings, files = manifest["version"], manifest["settings"], manifest["files"]
        names = {role: files[role]["name"] for role in ("embeddings", "records")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged: {error!r}") from error
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(f"{path}: written by a newer memkern (format {version}); this one reads up to {VERSION}")
    for role, name in names.items():
        _verify(folder / name, files[role], checksum=role != "embeddings" or not mmap)
    tensors = _tensors(folder / names["embeddings"], mmap)
    with (folder / names["records"]).open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    if len(records) != tensors["embeddings"].shape[0]:
        rows = tensors["embeddings"].shape[0]
        raise ValueError(f"{folder / names['records']}: damaged: {len(records)} records for {rows} embeddings")
    return settings, tensors, records


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "name": path.name,
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _verify(path: Path, expected: dict[str, Any], *, checksum: bool) -> None:
    if not path.exists():
        raise ValueError(f"{path}: damaged: the file is missing")
    if path.stat().st_size != expected["bytes"]:
        raise ValueError(f"{path}: damaged: {path.stat().st_size} bytes, expected {expected['bytes']}")
    if checksum and _describe(path)["sha256"] != expected["sha256"]:
        raise ValueError(f"{path}: damaged: its SHA-256 is not the one in {MANIFEST}")


def _tensors(path: Path, mmap: bool) -> dict[str, Tensor]:
    if not mmap:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged: {error}") from error
    with path.open("rb") as file:
        mapped = memory_map.mmap(file.fileno(), 0, access=memory_map.ACCESS_COPY)
    start = 8 + int.from_bytes(mapped[:8], "little")
    try:
        header = json.loads(mapped[8:start])
    except ValueError as error:
        raise ValueError(f"{path}: damaged: its header is not JSON") from error
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, (begin, end) = _DTYPES[entry["dtype"]], entry["data_offsets"]
        if end == begin:
            found[name] = torch.empty(entry["shape"], dtype=dtype)
            continue
        count = (end - begin) // dtype.itemsize
        found[name] = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start + begin).view(entry["shape"])
    return found


def _flush(path: Path) -> None:
    """Force a file's, or a folder's entries', way to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
