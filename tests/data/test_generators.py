"""The generators: exact answers, everything from the seed, nothing to be had without the fact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memkern.data.generators import babi_segments, cross_segment_pointer, position_recall, read_babi
from memkern.data.generators.pointer import pointer_vocabulary
from memkern.data.generators.segmented import CLS, NEEDLE, QUERY, SEP

STORY = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Mary travelled to the garden.
6 Sandra moved to the kitchen.
7 Where is Mary? \tgarden\t5
1 John took the apple.
2 Where is John? \tkitchen\t1
"""


def test_pointer_answers_are_exact() -> None:
    questions = cross_segment_pointer(200, 4, seed=3)
    assert questions.input_ids.max() < pointer_vocabulary()
    for row in range(questions.documents):
        ids = questions.input_ids[row]
        where = (ids == NEEDLE).nonzero()
        assert len(where) == 1
        segment, spot = where[0].tolist()
        assert questions.segments - 1 - segment == questions.distance[row]
        assert ids[-1, questions.answer_position[row]] == ids[segment, spot + 1]
        listed = ids[-1, questions.candidates[row]]
        assert sorted(listed.tolist()) == list(range(5, 13))
        assert (ids[:, -2:] == torch.tensor([SEP, CLS])).all()
        assert ids[-1, questions.candidates[row, 0] - 1] == QUERY
    assert set(questions.distance.tolist()) == {0, 1, 2, 3}
    assert questions.chance == 0.125


def test_pointer_list_tells_nothing() -> None:
    questions = cross_segment_pointer(4000, 2, distance=1, seed=1)
    places = torch.bincount(questions.answer_position - questions.candidates[0, 0], minlength=8) / 4000
    assert (places - 0.125).abs().max() < 4 * (0.125 * 0.875 / 4000) ** 0.5


def test_pointer_comes_from_the_seed() -> None:
    one, same, other = (cross_segment_pointer(20, 3, seed=seed) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one.input_ids, other.input_ids)


def test_pointer_takes_distances() -> None:
    assert cross_segment_pointer(5, 4, distance=2).distance.tolist() == [2] * 5
    wanted = torch.tensor([0, 1, 2])
    assert torch.equal(cross_segment_pointer(3, 3, distance=wanted).distance, wanted)
    assert cross_segment_pointer(0, 3).input_ids.shape == (0, 3, 18)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distance": 3}, r"distance: expected values in \[0, 3\)"),
        ({"segment_length": 10}, "segment_length: expected at least 13, got 10"),
        ({"segments": 0}, "segments: expected at least 1"),
        ({"values": 1}, "values: expected at least 2"),
    ],
)
def test_pointer_refuses(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_segment_pointer(4, **({"segments": 3} | arguments))


def test_recall_answers_are_exact() -> None:
    streams = position_recall(96, 32, seed=2)
    assert torch.bincount(streams.position).tolist() == [3] * 32
    for row in range(96):
        key = streams.query[row, 1]
        (at,) = (streams.facts[row, :, 1] == key).nonzero()
        assert at.item() == streams.position[row]
        assert streams.facts[row, at.item(), 3] == streams.answer[row]
    assert streams.facts.max() < streams.vocabulary
    assert streams.text(streams.facts[0, 0]).startswith("STORE ")
    assert streams.text(streams.query[0]).split()[1] == streams.text(streams.facts[0, 0]).split()[1]


def test_recall_takes_positions_and_seeds() -> None:
    assert position_recall(4, 8, position=5).position.tolist() == [5] * 4
    one, same = position_recall(9, seed=1), position_recall(9, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one[:4], same[:4], strict=True))
    with pytest.raises(ValueError, match=r"position: expected values in \[0, 8\)"):
        position_recall(4, 8, position=8)
    with pytest.raises(ValueError, match="facts: expected 1 to 64, got 65"):
        position_recall(4, 65)


def test_babi_stories_and_segments(tmp_path: Path) -> None:
    path = tmp_path / "qa1.txt"
    path.write_text(STORY)
    stories = read_babi(path)
    assert [story.answer for story in stories] == ["bathroom", "garden", "kitchen"]
    assert stories[1].support == (3,)
    assert stories[1].sentences[3] == "Mary travelled to the garden."
    questions, words = babi_segments(stories, seed=4)
    assert questions.segment_mask.sum(1).tolist() == [2, 4, 2]
    assert questions.segment_mask[:, -1].all()
    assert questions.distance.tolist() == [1, 2, 1]
    assert questions.chance == pytest.approx(1 / 3)
    for row, story in enumerate(stories):
        assert words[questions.input_ids[row, -1, questions.answer_position[row]]] == story.answer
        listed = [words[i] for i in questions.input_ids[row, -1, questions.candidates[row]]]
        assert sorted(listed) == ["bathroom", "garden", "kitchen"]
    short = questions.select(torch.tensor([0, 2]))
    assert short.segments == 2
    again, _ = babi_segments(stories, vocabulary=words, candidates=["bathroom", "garden", "kitchen"], seed=4)
    assert all(torch.equal(a, b) for a, b in zip(questions, again, strict=True))


def test_babi_refuses(tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_text("1 Mary moved.\n2 Where is Mary? \tbathroom\n")
    with pytest.raises(ValueError, match=r"bad.txt:2: expected 'question<tab>answer<tab>facts'"):
        read_babi(path)
    path.write_text("Mary moved.\n")
    with pytest.raises(ValueError, match=r"bad.txt:1: expected a bAbI line"):
        read_babi(path)
    path.write_text(STORY)
    stories = read_babi(path)
    with pytest.raises(ValueError, match="vocabulary: the word"):
        babi_segments(stories, vocabulary=["<pad>"])
    with pytest.raises(ValueError, match="candidates: the answer 'bathroom'"):
        babi_segments(stories, candidates=["garden"])
