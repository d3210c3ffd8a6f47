"""Plain text as training data: a tokenizer, passages, and items whose memory is the text around them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memkern.data.chunkers import windows

PYDOC = "pydoc"
SPECIAL = ("[PAD]", "[MEM]", "[SEP]")


@dataclass(frozen=True)
class Passage:
    """A window of a text, without overlap."""

    source: str
    number: int
    tokens: list[int]
    text: str
    held_out: bool


def read_texts(source: str) -> list[tuple[str, str]]:
    """(name, text) of a file, of every .txt file of a folder, or of ``pydoc``, CPython's own documentation.

    Raises:
        ValueError: nothing readable there.
    """
    if source == PYDOC:
        from pydoc_data.topics import topics

        return [(name, topics[name]) for name in sorted(topics)]
    path = Path(source)
    files = sorted(path.glob("**/*.txt")) if path.is_dir() else [path]
    try:
        found = [(str(file), file.read_text(encoding="utf-8")) for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: cannot be read as UTF-8 text: {error}") from error
    if not found:
        raise ValueError(f"{source}: expected a text file, a folder with .txt files, or {PYDOC!r}")
    return found


def byte_pair_tokenizer(texts: Iterable[str], size: int) -> Any:
    """A fast transformers tokenizer of ``size`` byte pairs trained on ``texts``, with padding and the two marks."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise ImportError("training a tokenizer needs: pip install 'memkern[models]'") from error
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=SPECIAL[0], extra_special_tokens=list(SPECIAL[1:]))


def cut(texts: Sequence[tuple[str, str]], tokenizer: Any, size: int, hold_out: int = 10) -> list[Passage]:
    """Whole windows of ``size`` tokens in reading order; every ``hold_out``-th is held out, none for 0."""
    found: list[Passage] = []
    for name, text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for number, (start, end) in enumerate(windows(len(ids), size, 0)):
            if end - start == size:
                held_out = hold_out > 0 and len(found) % hold_out == hold_out - 1
                tokens = ids[start:end]
                found.append(Passage(name, number, tokens, tokenizer.decode(tokens), held_out))
    return found


def items(
    passages: Sequence[Passage], prompt: int, context: int, seed: int, *, held_out: bool = False
) -> list[dict[str, Any]]:
    """Items for :class:`memkern.training.RAGTrainer`: the rest of a passage is predicted after its first ``prompt``.

    Its chunks are the passages before and after it, then random others; the one before (else after) answers. Passages
    that are held out serve neither as texts nor as chunks, unless ``held_out`` asks for them as texts.
    """
    draw = random.Random(seed)
    kept = [passage for passage in passages if not passage.held_out]
    place = {(passage.source, passage.number): passage for passage in kept}
    found = []
    for passage in passages:
        if passage.held_out != held_out:
            continue
        sides = (place.get((passage.source, passage.number + step)) for step in (-1, 1))
        near = [other for other in sides if other is not None]
        others = draw.sample(kept, min(context, len(kept)))
        chunks = near + [other for other in others if other is not passage and other not in near]
        found.append(
            {
                "input_ids": passage.tokens,
                "labels": [-100] * prompt + passage.tokens[prompt:],
                "context_chunks": [other.tokens for other in chunks[:context]],
                "positive": 0 if near and context else -1,
            }
        )
    draw.shuffle(found)
    return found
