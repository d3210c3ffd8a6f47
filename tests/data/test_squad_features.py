"""The featuriser: every window's offsets and spans hold against a search over all spans."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from memkern.data import (
    configure_memory_tokens,
    group_documents,
    join_articles,
    load_squad,
    squad_features,
    train_xlnet_tokenizer,
)

REAL = Path(__file__).parents[3] / "shared/data/squad-v2.0-dev-3articles.json"


def smallest_cover(feature: dict[str, Any]) -> tuple[int, int] | None:
    """The shortest token span over the answer, by trying all."""
    begin, end = feature["chosen_answer_char_span"]
    spans = feature["offset_mapping"]
    tokens = [i for i, (a, b) in enumerate(spans) if b > a]
    covers = [
        (j - i, i, j)
        for i in tokens
        for j in tokens
        if begin >= 0 and i <= j < i + 40 and spans[i][0] <= begin and end <= spans[j][1]
    ]
    return min(covers)[1:] if covers else None


def check(features: list[dict[str, Any]], max_length: int) -> int:
    """Every promise about a window; returns how many hold their answer."""
    found = 0
    for feature in features:
        for key in ("input_ids", "attention_mask", "token_type_ids", "offset_mapping"):
            assert len(feature[key]) == max_length
        span = smallest_cover(feature)
        label = feature["start_positions"], feature["end_positions"]
        assert feature["has_answer_in_segment"] == (span is not None)
        if span is None:
            assert label == (feature["cls_index"],) * 2
            continue
        found += 1
        assert label[1] - label[0] == span[1] - span[0]
        text = feature["context"][feature["offset_mapping"][label[0]][0] : feature["offset_mapping"][label[1]][1]]
        assert feature["chosen_answer_text"] in text
    return found


def test_windows_of_a_left_padding_tokenizer(squad: dict[str, Any], tokenizer: Any) -> None:
    features = squad_features(squad, tokenizer, max_length=64, doc_stride=16)
    assert check(features, 64) >= 4
    documents = group_documents(features)
    assert list(documents) == ["n1", "n2", "n3", "n4", "r1"]
    for windows in documents.values():
        assert [window["segment_index"] for window in windows] == list(range(windows[0]["total_segments"]))
        assert windows[0]["has_answer"] == any(window["has_answer_in_segment"] for window in windows)
    assert len(documents["n1"]) > 2
    feature = documents["n1"][-1]
    assert feature["cls_index"] == 63
    assert feature["input_ids"][63] == tokenizer.cls_token_id
    types = dict(zip(feature["input_ids"], feature["token_type_ids"], strict=True))
    assert types[tokenizer.cls_token_id] == 2
    assert types[tokenizer.pad_token_id] == 3
    assert documents["n2"][0]["question"] == "When did the identity emerge?"
    assert documents["n2"][0]["all_valid_answers"] == ["first half of the 10th century", "10th century"]
    assert documents["n3"][0]["chosen_answer_char_span"] == [-1, -1]


def test_neighbours_share_doc_stride_tokens(squad: dict[str, Any], tokenizer: Any) -> None:
    windows = group_documents(squad_features(squad, tokenizer, max_length=64, doc_stride=16))["n1"]
    spans = [[span for span in window["offset_mapping"] if span[1] > span[0]] for window in windows]
    for before, after in itertools.pairwise(spans):
        assert before[-16:] == after[:16]


def test_right_padding_tokenizer_puts_the_question_first(squad: dict[str, Any], tokenizer: Any) -> None:
    right = copy.deepcopy(tokenizer)
    right.padding_side = "right"
    features = squad_features(squad, right, max_length=80, doc_stride=16)
    assert check(features, 80) >= 4
    assert features[0]["attention_mask"][0] == 1
    assert features[-1]["attention_mask"][-1] == 0


def test_memory_tokens_stand_behind_the_text(squad: dict[str, Any], tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    plain = squad_features(squad, own, max_length=60, doc_stride=16)
    ids = configure_memory_tokens(own, 2)
    behind = squad_features(squad, own, max_length=64, doc_stride=16, memory_tokens=ids)
    assert len(plain) == len(behind)
    for one, other in zip(plain, behind, strict=True):
        assert other["input_ids"] == one["input_ids"] + ids["mem_read_ids"] + ids["mem_write_ids"]
        assert other["attention_mask"] == one["attention_mask"] + [1] * 4
        assert set(other["token_type_ids"][-4:]).isdisjoint(other["token_type_ids"][:-4])
        assert other["start_positions"] == one["start_positions"]
        assert other["cls_index"] == one["cls_index"]


def test_memory_tokens_keep_the_other_special_tokens(tokenizer: Any, tmp_path: Path) -> None:
    own = copy.deepcopy(tokenizer)
    before, size = set(own.all_special_tokens), len(own)
    ids = configure_memory_tokens(own, 3)
    assert ids == {"mem_read_ids": [size, size + 1, size + 2], "mem_write_ids": [size + 3, size + 4, size + 5]}
    assert before < set(own.all_special_tokens)
    assert configure_memory_tokens(own, 3) == ids
    assert len(own) == size + 6
    assert own("[MEM_WRITE_1]", add_special_tokens=False)["input_ids"] == [size + 4]
    own.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    assert configure_memory_tokens(AutoTokenizer.from_pretrained(tmp_path), 3) == ids
    assert configure_memory_tokens(own, 0) == {"mem_read_ids": [], "mem_write_ids": []}
    with pytest.raises(ValueError, match="mem_token_count: expected an integer of at least 0, got -1"):
        configure_memory_tokens(own, -1)


def test_trained_tokenizers_are_the_same_for_the_same_texts(squad: dict[str, Any], tokenizer: Any) -> None:
    texts = [example.context for example in load_squad(squad)]
    first, second = (train_xlnet_tokenizer(texts, vocab_size=250) for _ in range(2))
    assert first._tokenizer.to_str() == second._tokenizer.to_str()
    assert (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.unk_token_id) == (5, 3, 0)
    with pytest.raises(ValueError, match="texts: expected at least one"):
        train_xlnet_tokenizer([" "])


@pytest.mark.parametrize("broken", [{"answer_start": 3}, {"answer_start": -1}, {"text": ""}, {"text": "Atlantis"}])
def test_broken_answers_are_refused_or_skipped(squad: dict[str, Any], tokenizer: Any, broken: dict[str, Any]) -> None:
    squad["data"][0]["paragraphs"][0]["qas"][3]["answers"][0].update(broken)
    with pytest.raises(ValueError, match="question 'n4'"):
        squad_features(squad, tokenizer, max_length=64, doc_stride=16)
    with pytest.warns(UserWarning, match="left out 1 questions: 'n4'"):
        features = squad_features(squad, tokenizer, max_length=64, doc_stride=16, on_bad_answer="skip")
    assert [*group_documents(features)] == ["n1", "n2", "n3", "r1"]


def test_bad_arguments_are_named(squad: dict[str, Any], tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"max_length: question 'n1'.*more than doc_stride"):
        squad_features(squad, tokenizer, max_length=24, doc_stride=16)
    with pytest.raises(ValueError, match="on_bad_answer: expected 'raise' or 'skip'"):
        squad_features(squad, tokenizer, on_bad_answer="hide")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokenizer: expected a fast one"):
        squad_features(squad, object())
    squad["data"].append(squad["data"][1])
    with pytest.raises(ValueError, match="expected every question id once, got 'r1' again"):
        load_squad(squad)


def test_sources_of_one_content_agree(squad: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(squad))
    examples = load_squad(path)
    flat = [
        {
            "id": example.id,
            "question": example.question,
            "context": example.context,
            "title": example.title,
            "answers": {"text": list(example.answers), "answer_start": list(example.answer_starts)},
        }
        for example in examples
    ]
    assert load_squad(squad) == load_squad(squad["data"]) == load_squad(flat) == load_squad(examples) == examples
    datasets = pytest.importorskip("datasets")
    assert load_squad(datasets.Dataset.from_list(flat)) == examples


def test_files_that_are_no_squad(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    with pytest.raises(FileNotFoundError):
        load_squad(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json: expected JSON"):
        load_squad(path)
    path.write_text('{"version": "1"}')
    with pytest.raises(ValueError, match=r"bad\.json: expected SQuAD's form with a list under 'data'"):
        load_squad(path)
    path.write_text('{"data": [{"title": "T", "paragraphs": [{"qas": []}]}, {"id": "x", "question": "?"}]}')
    with pytest.raises(ValueError, match="expected SQuAD articles or rows, got 'x'"):
        load_squad(path)


def test_joined_articles_keep_their_answers(squad: dict[str, Any]) -> None:
    paragraph = copy.deepcopy(squad["data"][1]["paragraphs"][0])
    squad["data"][1]["title"] = "Normans"
    joined = join_articles(load_squad(squad))
    assert all(example.bad_answer() is None for example in joined)
    assert len({example.context for example in joined}) == 1
    assert joined[0].context.endswith(paragraph["context"])


def test_real_articles() -> None:
    if not REAL.exists():
        pytest.skip(f"no {REAL.name} beside the repository")
    pytest.importorskip("transformers")
    examples = load_squad(REAL)
    assert len(examples) == 1124
    tokenizer = train_xlnet_tokenizer({example.context for example in examples}, vocab_size=2000)
    some = examples[::12]
    features = squad_features(some, tokenizer, max_length=128, doc_stride=32)
    assert check(features, 128) >= sum(bool(example.answers) for example in some)
