"""SQuAD-format questions as model inputs: overlapping windows of the passage, with offsets and token spans."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from memkern.data.squad import SquadExample, SquadSource, load_squad

SquadFeature = dict[str, Any]

XLNET_PAD_SEGMENT = 3  # XLNet's token types: 0 and 1 for the two texts, 2 for <cls>, 3 for padding
MEMORY_SEGMENT = 4


def squad_features(
    dataset: SquadSource,
    tokenizer: Any,
    max_length: int = 384,
    doc_stride: int = 128,
    on_bad_answer: Literal["raise", "skip"] = "raise",
    *,
    memory_tokens: Mapping[str, Sequence[int]] | None = None,
) -> list[SquadFeature]:
    """Windows over each question's passage, in the order of the questions.

    A tokenizer that pads on the left (XLNet) gets the passage first and ``<cls>`` last, any other the question first.

    Args:
        dataset: what :func:`memkern.data.load_squad` takes.
        tokenizer: a fast tokenizer of transformers.
        max_length: tokens L of a window, memory tokens included; every feature has this length.
        doc_stride: tokens that neighbouring windows share.
        on_bad_answer: an answer that does not stand where ``answer_start`` says: "raise" ends with its question's id,
            "skip" leaves the question out and warns.
        memory_tokens: what :func:`memkern.data.configure_memory_tokens` returned, to stand behind the text; None
            leaves memory tokens to the model.

    Returns:
        One dictionary a window: ``input_ids``, ``attention_mask``, ``token_type_ids``, ``offset_mapping`` (L entries;
        (start, end) in ``context`` on passage tokens, (0, 0) elsewhere); ``start_positions``, ``end_positions`` (the
        smallest token span that covers the answer; ``cls_index`` where the window does not hold it whole);
        ``cls_index``; ``example_id`` (the question's own), ``segment_index``, ``segment_index_in_doc``,
        ``total_segments``; ``context``, ``question``, ``has_answer``, ``has_answer_in_segment``,
        ``chosen_answer_text``, ``chosen_answer_char_span`` ([-1, -1] without one), ``all_valid_answers``.

    Raises:
        ValueError: a broken answer, a question that leaves no room for its passage, or a bad argument.
    """
    if on_bad_answer not in ("raise", "skip"):
        raise ValueError(f"on_bad_answer: expected 'raise' or 'skip', got {on_bad_answer!r}")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer: expected a fast one, which knows offsets, got {type(tokenizer).__name__}")
    behind = [*memory_tokens["mem_read_ids"], *memory_tokens["mem_write_ids"]] if memory_tokens else []
    examples = _checked(load_squad(dataset), on_bad_answer)
    if not examples:
        return []
    passage_first = tokenizer.padding_side == "left"
    questions = [example.question.lstrip() for example in examples]
    contexts = [example.context for example in examples]
    room = max_length - len(behind)
    _check_room(examples, questions, tokenizer, room, doc_stride)
    encoded = tokenizer(
        *((contexts, questions) if passage_first else (questions, contexts)),
        truncation="only_first" if passage_first else "only_second",
        max_length=room,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    windows: dict[int, list[int]] = {}
    for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
        windows.setdefault(row, []).append(window)
    features = []
    for row, example in enumerate(examples):
        for index, window in enumerate(windows[row]):
            own = [number == (0 if passage_first else 1) for number in encoded.sequence_ids(window)]
            offsets = [
                tuple(span) if passage else (0, 0)
                for span, passage in zip(encoded["offset_mapping"][window], own, strict=True)
            ]
            ids = encoded["input_ids"][window]
            cls = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] == tokenizer.cls_token_id), 0)
            first, last = index == 0, index == len(windows[row]) - 1
            span = _token_span(offsets, own, _words_span(example), first, last) or (cls, cls)
            left = room - len(ids) if passage_first else 0
            right = max_length - left - len(ids) - len(behind)
            features.append(
                {
                    "input_ids": _padded(ids, left, right, tokenizer.pad_token_id or 0, behind),
                    "attention_mask": _padded([1] * len(ids), left, right, 0, [1] * len(behind)),
                    "token_type_ids": _padded(
                        encoded["token_type_ids"][window],
                        left,
                        right,
                        XLNET_PAD_SEGMENT if passage_first else tokenizer.pad_token_type_id,
                        [MEMORY_SEGMENT] * len(behind),
                    ),
                    "offset_mapping": _padded(offsets, left, right, (0, 0), [(0, 0)] * len(behind)),
                    "start_positions": left + span[0],
                    "end_positions": left + span[1],
                    "cls_index": left + cls,
                    "example_id": example.id,
                    "segment_index": index,
                    "segment_index_in_doc": index,
                    "total_segments": len(windows[row]),
                    "context": example.context,
                    "question": questions[row],
                    "has_answer": bool(example.answers),
                    "has_answer_in_segment": span != (cls, cls),
                    "chosen_answer_text": example.answers[0] if example.answers else "",
                    "chosen_answer_char_span": list(_char_span(example) or (-1, -1)),
                    "all_valid_answers": list(example.answers),
                }
            )
    return features


def group_documents(features: Sequence[SquadFeature]) -> dict[str, list[SquadFeature]]:
    """The windows of each question in their order, questions in the order they first occur."""
    documents: dict[str, list[SquadFeature]] = {}
    for feature in features:
        documents.setdefault(feature["example_id"], []).append(feature)
    for windows in documents.values():
        windows.sort(key=lambda feature: int(feature["segment_index"]))
    return documents


def _checked(examples: list[SquadExample], on_bad_answer: str) -> list[SquadExample]:
    good = []
    skipped = []
    for example in examples:
        wrong = example.bad_answer()
        if wrong is None:
            good.append(example)
        elif on_bad_answer == "raise":
            raise ValueError(f"dataset: question {example.id!r}: {wrong}; on_bad_answer='skip' leaves such out")
        else:
            skipped.append(f"{example.id!r} ({wrong})")
    if skipped:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        warnings.warn(f"left out {len(skipped)} questions: {', '.join(skipped[:5])}{more}", stacklevel=3)
    return good


def _check_room(examples: list[SquadExample], questions: list[str], tokenizer: Any, room: int, stride: int) -> None:
    if stride < 0:
        raise ValueError(f"doc_stride: expected at least 0, got {stride}")
    special = tokenizer.num_special_tokens_to_add(pair=True)
    for example, ids in zip(examples, tokenizer(questions, add_special_tokens=False)["input_ids"], strict=True):
        left = room - special - len(ids)
        if left <= stride:
            raise ValueError(
                f"max_length: question {example.id!r} of {len(ids)} tokens leaves {left} of {room} for the passage; "
                f"expected more than doc_stride ({stride})"
            )


def _char_span(example: SquadExample) -> tuple[int, int] | None:
    if not example.answers:
        return None
    return example.answer_starts[0], example.answer_starts[0] + len(example.answers[0])


def _words_span(example: SquadExample) -> tuple[int, int] | None:
    """The answer's characters without white space around them, which belongs to no token or to the next one."""
    span = _char_span(example)
    if span is None:
        return None
    text = example.answers[0]
    return span[0] + len(text) - len(text.lstrip()), span[1] - len(text) + len(text.rstrip())


def _token_span(
    offsets: list[tuple[int, int]], own: list[bool], chars: tuple[int, int] | None, first: bool, last: bool
) -> tuple[int, int] | None:
    """The smallest span of passage tokens that covers the characters, None where the window does not.

    A tokenizer may drop characters at the ends of a text, so the document's first and last window reach to its ends.
    """
    passage = [i for i, inside in enumerate(own) if inside and offsets[i][0] < offsets[i][1]]
    if chars is None or not passage:
        return None
    begin, end = chars
    if first:
        begin = max(begin, offsets[passage[0]][0])
    if last:
        end = min(end, offsets[passage[-1]][1])
    if begin < offsets[passage[0]][0] or end > offsets[passage[-1]][1] or begin >= end:
        return None
    start = max(i for i in passage if offsets[i][0] <= begin)
    if offsets[start][1] <= begin:  # the answer starts with a character that no token has
        start = min((i for i in passage if i > start), default=start)
    return start, min(i for i in passage if i >= start and offsets[i][1] >= end)


def _padded(values: list[Any], left: int, right: int, pad: Any, behind: list[Any]) -> list[Any]:
    return [pad] * left + values + behind + [pad] * right
