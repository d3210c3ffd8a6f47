"""Saving and loading: the same store comes back, damage is named, a crash or a full disk leaves the old one."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from memkern.store import MemoryStore, persistence


def sample(**settings: object) -> MemoryStore:
    store = MemoryStore(8, max_chunks=12, **settings)  # type: ignore[arg-type]
    store.add_batch([f"text {i} é" for i in range(15)], torch.randn(15, 8), [{"n": i} for i in range(15)])
    store.delete([5, 9])
    store.add("tokens", torch.randn(8), token_ids=[1, 2, 3], id=100)
    return store


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip(tmp_path: Path, mmap: bool, dtype: torch.dtype) -> None:
    store = sample(dtype=dtype, retrieval_method="learned", eviction="ring")
    store.score_matrix = torch.randn(8, 8)
    store.save(tmp_path / "s")
    again = MemoryStore.load(tmp_path / "s", mmap=mmap)
    assert again.ids == store.ids
    assert again.chunks == store.chunks
    assert again.metadata == store.metadata
    assert again.token_ids == store.token_ids
    assert torch.equal(again.embeddings, store.embeddings)
    assert again.stats() == store.stats()
    query = torch.randn(8)
    assert again.search(query, 4) == store.search(query, 4)
    # Both go on alike: same next id, same evictions, used ids stay used.
    assert again.add("next", torch.ones(8)) == store.add("next", torch.ones(8)) == 101
    assert again.ids == store.ids
    with pytest.raises(ValueError, match="used before"):
        again.add("old", torch.ones(8), id=5)


def test_mapped_rows_are_private(tmp_path: Path) -> None:
    store = sample()
    store.save(tmp_path)
    mapped = MemoryStore.load(tmp_path, mmap=True)
    mapped.update(mapped.ids[0], embedding=torch.zeros(8))
    assert torch.equal(MemoryStore.load(tmp_path).embeddings, store.embeddings)


def test_any_text_comes_back(tmp_path: Path) -> None:
    store = MemoryStore(2)
    store.add('half a pair \ud83d, a line\u2028end, "\r\n"', torch.ones(2), {"source": "\udcff", "n": None})
    store.save(tmp_path)
    assert list(MemoryStore.load(tmp_path)) == list(store)


def test_empty_store(tmp_path: Path) -> None:
    for mmap in (False, True):
        MemoryStore(4).save(tmp_path)
        again = MemoryStore.load(tmp_path, mmap=mmap)
        assert len(again) == 0
        assert again.add("x", torch.ones(4)) == 0


def test_only_the_current_generation_stays(tmp_path: Path) -> None:
    store = sample()
    for _ in range(3):
        store.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    manifest = json.loads((tmp_path / "store.json").read_text())
    assert isinstance(manifest["version"], int)
    assert manifest["files"]["embeddings"]["name"].startswith("embeddings-00000003-")


def test_damage_and_newer_versions_are_named(tmp_path: Path) -> None:
    store = sample()
    with pytest.raises(FileNotFoundError, match=r"store\.json is missing"):
        MemoryStore.load(tmp_path)
    store.save(tmp_path)
    manifest = tmp_path / "store.json"
    good = manifest.read_text()
    records = next(tmp_path.glob("records-*.jsonl"))
    content = records.read_bytes()
    records.write_bytes(content.replace(b"text 8", b"text X"))
    with pytest.raises(ValueError, match=rf"{records.name}: damaged: its SHA-256"):
        MemoryStore.load(tmp_path)
    records.write_bytes(content[:-5])
    with pytest.raises(ValueError, match=rf"{records.name}: damaged: \d+ bytes, expected"):
        MemoryStore.load(tmp_path, mmap=True)
    records.write_bytes(content)
    embeddings = next(tmp_path.glob("embeddings-*"))
    raw = embeddings.read_bytes()
    embeddings.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{embeddings.name}: damaged"):
        MemoryStore.load(tmp_path)
    embeddings.unlink()
    with pytest.raises(ValueError, match="the file is missing"):
        MemoryStore.load(tmp_path)
    embeddings.write_bytes(raw)
    manifest.write_text(good.replace('"version": 1', '"version": 99'))
    with pytest.raises(ValueError, match=r"store\.json: written by a newer memkern \(format 99\)"):
        MemoryStore.load(tmp_path)
    manifest.write_text(good[:50])
    with pytest.raises(ValueError, match=r"store\.json: damaged"):
        MemoryStore.load(tmp_path)
    manifest.write_text(good)
    assert MemoryStore.load(tmp_path).ids == store.ids


@pytest.mark.parametrize("mmap", [False, True])
def test_any_changed_byte_is_found(tmp_path: Path, mmap: bool) -> None:
    """Where the embeddings are mapped, too, unless they are large."""
    sample().save(tmp_path)
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        for at in range(0, len(content), len(content) // 16):
            path.write_bytes(content[:at] + bytes([content[at] ^ 0x15]) + content[at + 1 :])
            with pytest.raises(ValueError, match=rf"{path.name}: damaged|written by a newer memkern"):
                MemoryStore.load(tmp_path, mmap=mmap)
        path.write_bytes(content)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_manifest_without_a_checksum_is_read_with_care(tmp_path: Path, mmap: bool) -> None:
    sample().save(tmp_path)
    path = tmp_path / "store.json"
    good = json.loads(path.read_text())
    del good["sha256"]
    path.write_text(json.dumps(good))
    assert len(MemoryStore.load(tmp_path, mmap=mmap)) == len(sample())
    settings, files = good["settings"], good["files"]
    outside = {**files, "records": {**files["records"], "name": "../records.jsonl"}}
    changes = [{"version": bad} for bad in (0, True, "1", None)] + [{"files": bad} for bad in ({}, outside, None)]
    changes += [{"settings": {**settings, name: 3}} for name in settings if name != "max_chunks"]
    changes += [{"settings": {}}, {"settings": {**settings, "colour": "red"}}]
    for content in (*({**good, **change} for change in changes), [], None, {}):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"store\.json: damaged"):
            MemoryStore.load(tmp_path, mmap=mmap)


def test_loading_follows_a_save_that_removed_what_it_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = sample()
    store.save(tmp_path)
    verify, saved = persistence._verify, []

    def meanwhile(*arguments: object) -> None:
        if not saved:
            saved.append(store.add("later", torch.ones(8)))
            store.save(tmp_path)
        verify(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(persistence, "_verify", meanwhile)
    assert MemoryStore.load(tmp_path).ids == store.ids


@pytest.mark.parametrize("limit", [0, 500, 20000])
def test_a_file_that_cannot_grow_leaves_the_old_store(tmp_path: Path, limit: int) -> None:
    """The tensors, which a library writes with errors of its own, and the records."""
    store = sample()
    store.save(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    store.add("more" * 10000, torch.ones(8))
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, earlier[1]))
    try:
        with pytest.raises(OSError, match="previous save is untouched") as caught:
            store.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
    assert caught.value.errno == errno.EFBIG
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert len(MemoryStore.load(tmp_path).chunks[-1]) < 10


def test_a_save_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / "store.json.0123abcd.tmp").touch()
    (tmp_path / "embeddings-00000007-0123abcd.safetensors").touch()
    (tmp_path / "store.json.mine.tmp").touch()
    sample().save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    assert (tmp_path / "store.json.mine.tmp").exists()


def test_a_full_disk_leaves_the_old_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = sample()
    store.save(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    store.add("more", torch.ones(8))

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(persistence, "_flush", full)
    with pytest.raises(OSError, match="previous save is untouched") as caught:
        store.save(tmp_path)
    assert caught.value.errno == 28
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert "more" not in MemoryStore.load(tmp_path).chunks


def test_metadata_that_is_not_json_is_refused(tmp_path: Path) -> None:
    store = sample()
    store.save(tmp_path)
    store.add("x", torch.ones(8), {"bad": object()})
    with pytest.raises(ValueError, match="metadata: cannot be written as JSON"):
        store.save(tmp_path)
    assert "x" not in MemoryStore.load(tmp_path).chunks


WRITER = """
import sys, torch
from memkern.store import MemoryStore
store = MemoryStore(64, max_chunks=4000)
store.add_batch(["chunk"] * 4000, torch.zeros(4000, 64))
step = 0
while True:
    step += 1
    store.update(0, chunk=str(step), embedding=torch.full((64,), float(step)))
    store.save(sys.argv[1])
    print(step, flush=True)
"""


def test_killing_a_save_at_any_moment_leaves_a_readable_store(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    for attempt in range(3):
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        assert process.stdout.readline()
        time.sleep(0.05 + 0.051 * attempt)
        process.kill()
        finished = [1, *(int(line) for line in process.stdout.read().split())]
        process.wait()
        store = MemoryStore.load(folder)
        step = int(store.get(0).text)
        # The last save that said it was done, or the one that was cut off just after its rename.
        assert step in (finished[-1], finished[-1] + 1)
        assert torch.equal(store.get(0).embedding, torch.full((64,), float(step)))
