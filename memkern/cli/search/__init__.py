"""``memkern search``: exact search in text files, and how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from memkern.cli._common import check_choices, console, named_errors, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from memkern.cli.search.evaluate import Question
    from memkern.store import Hit, MemoryStore
    from memkern.store.embedders import Embedder

_RANKINGS = ("embeddings", "bm25", "hybrid")
_DEPTH = 50  # of each ranking that a hybrid one fuses


def command(
    files: Annotated[list[Path] | None, typer.Argument(help="More text files.", show_default=False)] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text file; more may follow. 'pydoc' is the Python documentation.")
    ] = None,
    query: Annotated[list[str] | None, typer.Option(help="What to look for; may be given again.")] = None,
    top_k: Annotated[int, typer.Option(help="Hits for each query.")] = 5,
    embedder: Annotated[
        str, typer.Option(help="hashing, hashing:WIDTH, transformers:MODEL or sentence:MODEL.")
    ] = "hashing",
    ranking: Annotated[str, typer.Option(help="embeddings, bm25, or hybrid of both.")] = "embeddings",
    index: Annotated[
        str, typer.Option(help="exact, faiss-flat, faiss-hnsw, faiss-ivf, or a FAISS factory string.")
    ] = "exact",
    words: Annotated[int, typer.Option(help="Words in a chunk.")] = 120,
    overlap: Annotated[int, typer.Option(help="Words that neighbouring chunks share.")] = 30,
    store: Annotated[Path | None, typer.Option(help="Folder: searched when it exists, else written.")] = None,
    evaluate: Annotated[
        Path | None, typer.Option(help="Questions with passages (JSON lines or SQuAD format): print recall, nDCG, MRR.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the hits, or the metrics, to this file.")] = None,
) -> None:
    """Search text files by the cosine of their chunks with a query, exactly.

    Without a model chunks are embedded by hashed words, so that it works offline.
    """
    from memkern.cli.search import evaluate as metrics
    from memkern.store.embedders import from_name

    out = console()
    paths = [*(text or []), *(files or [])]
    with named_errors(ImportError, KeyError, OSError):
        check_choices("--ranking", [ranking], _RANKINGS)
        if not query and evaluate is None:
            raise ValueError("--query: expected at least one query, or --evaluate FILE")
        questions = metrics.read_questions(evaluate) if evaluate else []
        if not paths and not questions and not (store and store.exists()):
            raise ValueError("--text: expected at least one file, 'pydoc', or a --store that exists")
        encoder = from_name(embedder)
        held = _store(out, paths, questions, encoder, index, words, overlap, store)
        found = _search(held, encoder, query or [], top_k, ranking)
        report = metrics.evaluate(held, encoder, questions) if questions else {}
    for wanted, hits in zip(query or [], found, strict=True):
        _print_hits(out, wanted, hits)
    if report:
        _print_metrics(out, report, len(questions), len(held))
    if json is not None:
        listed = [
            [{"id": h.id, "score": h.score, "text": h.text, "metadata": h.metadata} for h in hits] for hits in found
        ]
        write_json(json, {"schema": 1, "queries": query or [], "hits": listed, "metrics": report})


def _store(
    out: Console,
    paths: list[Path],
    questions: list[Question],
    embedder: Embedder,
    index: str,
    words: int,
    overlap: int,
    folder: Path | None,
) -> MemoryStore:
    """The saved store, or a new one of the files (of the questions' passages where there is no file)."""
    import time

    from rich.progress import Progress

    from memkern.cli.search import corpus
    from memkern.cli.search import evaluate as metrics
    from memkern.store import MemoryStore
    from memkern.store.embedders import HashingEmbedder

    if folder is not None and folder.exists() and not paths:
        held = MemoryStore.load(folder, mmap=True)
        if held.d_model != embedder.d_model:
            raise ValueError(
                f"--embedder: {folder} holds rows of width {held.d_model}, this one gives {embedder.d_model}"
            )
        if isinstance(embedder, HashingEmbedder):
            embedder.fit(held.chunks)
        return held
    start = time.perf_counter()
    pieces = corpus.cut(corpus.read(paths), words, overlap) if paths else metrics.passages(questions)
    if not pieces:
        raise ValueError("--text: there is no text in these files")
    with Progress(console=out, transient=True) as progress:
        task = progress.add_task("embedding", total=len(pieces))
        held = corpus.build(pieces, embedder, index, lambda count: progress.advance(task, count))
    sources = len({piece.source for piece in pieces})
    out.print(f"{len(held)} chunks of {sources} texts stored in {time.perf_counter() - start:.1f} s")
    if folder is not None:
        held.save(folder)
        out.print(f"saved: {folder}")
    return held


def _search(store: MemoryStore, embedder: Embedder, queries: list[str], top_k: int, ranking: str) -> list[list[Hit]]:
    """The hits of each query; the score of bm25 is its own, that of hybrid the cosine."""
    from dataclasses import replace

    from memkern.store.bm25 import BM25, reciprocal_rank_fusion

    if not queries:
        return []
    rows = embedder.encode(queries, kind="query")
    if ranking == "embeddings":
        return store.search_batched(rows, top_k)
    bm25 = BM25(store.chunks, store.ids)
    lexical = [bm25.search(query, max(top_k, _DEPTH)) for query in queries]
    if ranking == "bm25":
        return [[replace(_as_hit(store, id), score=score) for id, score in row[:top_k]] for row in lexical]
    dense = store.search_batched(rows, max(top_k, _DEPTH))
    found = []
    for hits, row, query in zip(dense, lexical, rows, strict=True):
        fused = reciprocal_rank_fusion([[hit.id for hit in hits], [id for id, _ in row]])[:top_k]
        scores = {hit.id: hit.score for hit in hits}
        unit = {id: _cosine(store, id, query) for id in fused if id not in scores}
        found.append([replace(_as_hit(store, id), score=(scores | unit)[id]) for id in fused])
    return found


def _cosine(store: MemoryStore, id: Any, query: Tensor) -> float:
    return float(store.get(id).embedding.float() @ query)


def _as_hit(store: MemoryStore, id: Any) -> Hit:
    from memkern.store import Hit

    chunk = store.get(id)
    return Hit(chunk.id, chunk.text, chunk.token_ids, 0.0, chunk.metadata)


def _print_hits(out: Console, query: str, hits: list[Hit]) -> None:
    from rich.table import Table

    table = Table(title=escape(query), title_justify="left", box=None, header_style="bold", title_style="bold")
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("where", no_wrap=True, style="cyan")
    table.add_column("text")
    for hit in hits:
        where = f"{hit.metadata.get('source', '')}:{hit.metadata.get('start', '')}"
        excerpt = " ".join(hit.text.split())
        table.add_row(f"{hit.score:.3f}", escape(where), escape(excerpt[:240] + ("..." if len(excerpt) > 240 else "")))
    out.print(table if hits else f"{escape(query)}: no hit")


def _print_metrics(out: Console, report: dict[str, dict[str, float]], questions: int, chunks: int) -> None:
    from rich.table import Table

    title = f"{questions} questions over {chunks} chunks"
    table = Table(title=title, title_justify="left", box=None, header_style="bold", title_style="bold")
    table.add_column("ranking")
    for name in next(iter(report.values())):
        table.add_column(name, justify="right")
    for ranking, values in report.items():
        table.add_row(ranking, *(f"{value:.3f}" for value in values.values()))
    out.print(table)
    if "bm25" not in report:
        out.print("[dim]bm25 and hybrid left out: pip install 'memkern\\[search]'[/]")
