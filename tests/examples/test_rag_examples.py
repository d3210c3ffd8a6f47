"""The Self-RAG and hybrid examples run in a short form."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_self_rag_memory(capsys):
    load("self_rag_memory").main(steps=2)
    printed = capsys.readouterr().out
    assert "eval_perplexity" in printed
    assert "chunks came back" in printed


def test_hybrid_memory(capsys):
    load("hybrid_memory").main()
    printed = capsys.readouterr().out
    assert "equals its backbone: True" in printed
    assert "step 4" in printed
