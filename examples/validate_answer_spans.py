"""Check a SQuAD-format file: does every answer stand where it says, and do the token spans give it back?

    python examples/validate_answer_spans.py dev.json [--tokenizer FOLDER] [--max-length 384] [--doc-stride 128]

Ends with 1 when an answer is broken. Without a tokenizer one is trained on the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from memkern.analysis import normalize_answer
from memkern.data import group_documents, load_squad, squad_features, train_xlnet_tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a SQuAD-format JSON file")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer")
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--doc-stride", type=int, default=128)
    options = parser.parse_args(arguments)

    examples = load_squad(options.dataset)
    broken = {example.id: wrong for example in examples if (wrong := example.bad_answer()) is not None}
    for id, wrong in broken.items():
        print(f"{id}: {wrong}")

    if options.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    else:
        tokenizer = train_xlnet_tokenizer(dict.fromkeys(example.context for example in examples))
    good = [example for example in examples if example.id not in broken]
    features = squad_features(good, tokenizer, max_length=options.max_length, doc_stride=options.doc_stride)
    documents = group_documents(features)

    exact = wider = lost = 0
    for windows in documents.values():
        if not windows[0]["has_answer"]:
            continue
        held = [window for window in windows if window["has_answer_in_segment"]]
        if not held:
            lost += 1
            continue
        window = held[0]
        spans = window["offset_mapping"]
        text = window["context"][spans[window["start_positions"]][0] : spans[window["end_positions"]][1]]
        same = normalize_answer(text) == normalize_answer(window["chosen_answer_text"])
        exact, wider = exact + same, wider + (not same)

    answerable = sum(bool(example.answers) for example in good)
    print(
        f"{len(examples)} questions, {len(broken)} broken, {answerable} answerable, "
        f"{len(features)} windows of {options.max_length} tokens\n"
        f"token spans: {exact} give the answer back, {wider} cover more than it, {lost} are cut by every window"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
