"""How a store lies on disk, and why a crash cannot lose it.

A folder holds ``store.json`` (format version, settings, and the names, sizes and SHA-256 of the data files of its
generation), ``embeddings-<generation>.safetensors`` and ``records-<generation>.jsonl``. A save writes the new
generation beside the old one, flushes it to disk and then renames ``store.json`` into place: that one rename is the
save. Old generations are removed afterwards. Processes that save into one folder take turns; one that loads meanwhile
starts again when the generation it was reading has gone.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap as memory_map
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VERSION = 1
MANIFEST = "store.json"
# Up to here a checksum costs less than a tenth of a second, and mapped files are read whole for it too.
CHECKED_WHEN_MAPPED = 64 << 20
_TEMPORARY = re.compile(re.escape(MANIFEST) + r"\.[0-9a-f]{8}\.tmp")
_DATA_FILE = re.compile(r"(embeddings|records)-(\d{8})-[0-9a-f]{8}\.(safetensors|jsonl)(\.tmp)?")
_ROLES = ("embeddings", "records")
_FIELDS = frozenset({"id", "text", "token_ids", "metadata"})
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}


def save(
    folder: Path, *, settings: dict[str, Any], tensors: dict[str, Tensor], records: Iterable[dict[str, Any]]
) -> None:
    """Write a new generation and make it the current one.

    Raises:
        OSError: the disk is full or cannot be written; the previous save is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        found = [int(match[2]) for match in map(_DATA_FILE.fullmatch, os.listdir(folder)) if match]
        generation = 1 + max(found, default=0)
        _write(folder, generation, settings, tensors, records)
        _flush(folder)
        for name in os.listdir(folder):
            match = _DATA_FILE.fullmatch(name)
            if (match and int(match[2]) < generation) or _TEMPORARY.fullmatch(name):
                (folder / name).unlink(missing_ok=True)


def _write(
    folder: Path,
    generation: int,
    settings: dict[str, Any],
    tensors: dict[str, Tensor],
    records: Iterable[dict[str, Any]],
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # The random part keeps two processes apart that save at once where folders cannot be locked.
    suffix = f"{generation:08d}-{secrets.token_hex(4)}"
    embeddings, lines = folder / f"embeddings-{suffix}.safetensors", folder / f"records-{suffix}.jsonl"
    manifest = folder / f"{MANIFEST}.{secrets.token_hex(4)}.tmp"
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, embeddings)
        with lines.open("w", encoding="utf-8", errors="surrogatepass") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        described = {role: _describe(path) for role, path in (("embeddings", embeddings), ("records", lines))}
        content = {"format": "memkern.MemoryStore", "version": VERSION, "settings": settings, "files": described}
        content["sha256"] = _digest(content)
        manifest.write_text(json.dumps(content, indent=2), encoding="utf-8")
        for path in (embeddings, lines, manifest):
            _flush(path)
        os.replace(manifest, folder / MANIFEST)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        for path in (embeddings, lines, manifest):
            path.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            said = f"saving the store failed, the previous save is untouched: {error}"
            raise OSError(_number(error), said) from error
        raise ValueError(f"metadata: cannot be written as JSON, the previous save is untouched: {error}") from error


def _number(error: Exception) -> int:
    """The errno of a failed write; safetensors gives it in its text."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else errno.EIO


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, where the system can lock a folder; the lock goes with the process that holds it."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def load(folder: Path, *, mmap: bool) -> tuple[dict[str, Any], dict[str, Tensor], list[dict[str, Any]]]:
    """Settings, tensors and records of the current generation; checksums are compared before anything is built.

    With ``mmap`` the embeddings are a private map of their file: of a large one only the size is compared, since
    reading it all for a checksum is what the map avoids.

    Raises:
        FileNotFoundError: there is no store. ValueError: a damaged or newer file, named.
    """
    path = folder / MANIFEST
    while True:
        if not path.exists():
            raise FileNotFoundError(f"no memory store in {folder}: {MANIFEST} is missing")
        content = path.read_bytes()
        try:
            return _read(path, content, mmap)
        except (ValueError, FileNotFoundError):
            if path.exists() and path.read_bytes() != content:
                continue  # another process saved meanwhile, and removed what this one was reading
            raise


def _read(path: Path, content: bytes, mmap: bool) -> tuple[dict[str, Any], dict[str, Tensor], list[dict[str, Any]]]:
    try:
        manifest = json.loads(content.decode("utf-8"))
        version, settings, files = manifest["version"], manifest["settings"], manifest["files"]
        if type(version) is not int or version < 1:
            raise ValueError(f"format {version!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged: {error!r}") from error
    if version > VERSION:
        raise ValueError(f"{path}: written by a newer memkern (format {version}); this one reads up to {VERSION}")
    try:
        # Without one: written before manifests had a checksum of their own.
        if manifest.get("sha256", _digest(manifest)) != _digest(manifest):
            raise ValueError("its SHA-256 is not its own")
        described = {role: (files[role]["name"], files[role]["bytes"], files[role]["sha256"]) for role in _ROLES}
        for name, _, _ in described.values():
            if not _DATA_FILE.fullmatch(name):
                raise ValueError(f"{name!r} is no data file")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged: {error!r}") from error
    for role, (name, size, checksum) in described.items():
        skipped = mmap and role == "embeddings" and size > CHECKED_WHEN_MAPPED
        _verify(path.parent / name, size, None if skipped else checksum)
    embeddings, lines = (path.parent / described[role][0] for role in _ROLES)
    tensors = _tensors(embeddings, mmap)
    try:
        rows, width = tensors["embeddings"].shape
        complete = tensors["inverse_norms"].shape == (rows,) and tensors["used_ids"].shape[1:] == (2,)
    except (KeyError, ValueError):
        complete = False
    if not complete:
        raise ValueError(f"{embeddings}: damaged: a tensor is missing or has the wrong shape")
    try:
        with lines.open(encoding="utf-8", errors="surrogatepass") as file:
            records = [json.loads(line) for line in file]
        fields = all(record.keys() >= _FIELDS for record in records)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{lines}: damaged: {error!r}") from error
    if not fields or len(records) != rows:
        raise ValueError(f"{lines}: damaged: {len(records)} records for {rows} embeddings, or one lacks a field")
    if settings.get("d_model") != width:
        raise ValueError(f"{path}: damaged: d_model {settings.get('d_model')!r} for embeddings of width {width}")
    return settings, tensors, records


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "name": path.name,
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, its own checksum apart."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _verify(path: Path, size: int, checksum: str | None) -> None:
    if not path.exists():
        raise ValueError(f"{path}: damaged: the file is missing")
    if path.stat().st_size != size:
        raise ValueError(f"{path}: damaged: {path.stat().st_size} bytes, expected {size}")
    if checksum is not None and _describe(path)["sha256"] != checksum:
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
    found = {}
    try:
        for name, entry in json.loads(mapped[8:start]).items():
            if name == "__metadata__":
                continue
            dtype, (begin, end) = _DTYPES[entry["dtype"]], entry["data_offsets"]
            count = (end - begin) // dtype.itemsize
            if count:
                flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start + begin)
            else:
                flat = torch.empty(0, dtype=dtype, device="cpu")
            found[name] = flat.view(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged: its header does not describe it: {error!r}") from error
    return found


def _flush(path: Path) -> None:
    """Force a file's, or a folder's entries', way to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
