"""``memkern search``: files in, hits out; stores kept; rankings measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from memkern.cli import main
from memkern.cli.search.evaluate import Question, read_questions, relevant

CATS = "Cats sleep for most of the day. They purr when they are content. " * 3
BOATS = "Sailing boats turn with the wind. A keel keeps the boat upright. " * 3
DUMP = [
    {"question": "why do cats purr", "passage": CATS.strip()},
    {"question": "what is a keel for", "passage": BOATS.strip()},
]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["search", *map(str, arguments)])


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "cats.txt", tmp_path / "boats.txt"]
    for path, text in zip(paths, (CATS, BOATS), strict=True):
        path.write_text(text)
    return paths


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, DUMP)))
    return path


@pytest.mark.parametrize("ranking", ["embeddings", "bm25", "hybrid"])
def test_finds_the_right_file(files: list[Path], tmp_path: Path, ranking: str) -> None:
    if ranking != "embeddings":
        pytest.importorskip("bm25s", reason="bm25s is not installed (memkern[search])")
    target = tmp_path / "hits.json"
    result = run(
        *("--text", *files, "--query", "the keel of a boat", "--query", "cats purr", "--words", 12, "--overlap", 4),
        *("--ranking", ranking, "--top-k", 2, "--json", target),
    )
    assert result.exit_code == 0, result.output
    found = json.loads(target.read_text())["hits"]
    assert [hits[0]["metadata"]["source"] for hits in found] == [str(files[1]), str(files[0])]
    assert all(len(hits) <= 2 and hits[0]["score"] >= hits[-1]["score"] for hits in found)
    metadata = found[0][0]["metadata"]
    assert BOATS[metadata["start"] : metadata["end"]] == found[0][0]["text"]


def test_a_saved_store_answers_as_the_files_did(files: list[Path], tmp_path: Path) -> None:
    arguments = ["--query", "a keel", "--json"]
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert run("--text", *files, "--store", tmp_path / "store", *arguments, first).exit_code == 0
    assert run("--store", tmp_path / "store", *arguments, second).exit_code == 0
    assert json.loads(first.read_text())["hits"] == json.loads(second.read_text())["hits"]


def test_evaluates_rankings(questions: Path, tmp_path: Path) -> None:
    target = tmp_path / "metrics.json"
    result = run("--evaluate", questions, "--json", target)
    assert result.exit_code == 0, result.output
    metrics = json.loads(target.read_text())["metrics"]
    assert metrics["embeddings"]["recall@1"] == 1.0
    assert metrics["embeddings"]["mrr"] == 1.0


def test_reads_squad_files(tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    qas = [{"question": " why? ", "is_impossible": False}, {"question": "what?", "is_impossible": True}]
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": CATS, "qas": qas}]}]}))
    assert read_questions(path) == [Question("why?", CATS)]


def test_a_chunk_is_relevant_when_it_holds_the_passage_or_is_held() -> None:
    question = Question("", "b  c\nd")
    assert relevant(question, [(0, "a b c d e"), (1, "b c"), (2, "a b"), (3, "b c d")]) == {0, 1, 3}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--text", "{cats}"], "--query"),
        (["--query", "x"], "--text"),
        (["--text", "{missing}", "--query", "x"], "cannot be read"),
        (["--text", "{cats}", "--query", "x", "--ranking", "best"], "--ranking"),
        (["--text", "{cats}", "--query", "x", "--embedder", "word2vec"], "embedder"),
        (["--text", "{cats}", "--query", "x", "--words", "3", "--overlap", "3"], "overlap"),
        (["--text", "{empty}", "--query", "x"], "no text"),
        (["--evaluate", "{cats}"], "neither JSON lines"),
        (["--text", "{cats}", "--query", "x", "--top-k", "0"], "top_k"),
    ],
    ids=str,
)
def test_bad_input(files: list[Path], tmp_path: Path, arguments: list[str], part: str) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    names = {"cats": files[0], "missing": tmp_path / "no.txt", "empty": tmp_path / "empty.txt"}
    result = run(*(argument.format(**names) for argument in arguments))
    assert result.exit_code == 2
    assert part in result.output


def test_another_width_than_the_stores_is_refused(files: list[Path], tmp_path: Path) -> None:
    assert run("--text", files[0], "--store", tmp_path / "store", "--query", "x").exit_code == 0
    result = run("--store", tmp_path / "store", "--query", "x", "--embedder", "hashing:64")
    assert result.exit_code == 2
    assert "width" in result.output
