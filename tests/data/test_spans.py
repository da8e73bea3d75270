"""Entities in tags, by a table made with seqeval 1.2.2, which counts as conlleval does."""

import random
import re

import pytest
import torch

from bora_fl.data.spans import span_counts, spans, tells_spans

CASES = {
    "O O": set(),
    "B-x": {(0, 1, "x")},
    "B-x I-x O I-x": {(0, 2, "x"), (3, 4, "x")},
    "B-x B-x I-y I-y": {(0, 1, "x"), (1, 2, "x"), (2, 4, "y")},
    "I-x I-x B-x": {(0, 2, "x"), (2, 3, "x")},
    "B-a-b I-a-b": {(0, 2, "a-b")},
}


@pytest.mark.parametrize("tags", CASES)
def test_entities_are_conllevals(tags: str):
    assert spans(tags.split()) == CASES[tags]


def test_entities_are_those_of_an_expression():
    """Kinds of one letter as a text of one letter a tag: a capital begins an entity."""
    rng = random.Random(0)
    for _ in range(200):
        tags = [rng.choice(["O", "B-x", "I-x", "B-y", "I-y"]) for _ in range(12)]
        text = "".join("." if tag == "O" else tag[2].upper() if tag[0] == "B" else tag[2] for tag in tags)
        found = {(m.start(), m.end(), m[0][0].lower()) for m in re.finditer("[Xx]x*|[Yy]y*", text)}
        assert spans(tags) == found


def test_counts_are_over_the_words_that_have_a_class():
    names = ["O", "B-x", "I-x"]
    labels = torch.tensor([[-100, -100, 1, -100, 2, 0], [-100, -100, 0, 1, -100, -100]])
    likely = torch.tensor([[0, 1, 0, 2, 1], [2, 0, 2, 1, 1]])
    logits = torch.nn.functional.one_hot(likely, 3).float()
    assert span_counts(logits, labels, names) == (3, 2, 2)


@pytest.mark.parametrize(
    ("names", "told"), [(["O", "B-x"], True), (["B-x", "I-x"], True), (["O"], False), (["O", "x"], False), ([], False)]
)
def test_names_tell_whether_they_are_those_of_entities(names: list[str], told: bool):
    assert tells_spans(names) is told
