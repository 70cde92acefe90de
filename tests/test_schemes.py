"""Schemes of tags: recognition, impossible transitions and their repair, entities as seqeval reads them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast.tasks.schemes import entities, is_tag, kinds_of, recognise, recognise_names, repaired, tags

SCHEMES = {"IOB1": "BI", "IOB2": "BI", "BIOES": "BIES", "BILOU": "BILU"}

# The same entities: X of two words, then at once X of one, O, Y of three, X of one.
WRITTEN = {
    "IOB1": "I-X I-X B-X O I-Y I-Y I-Y I-X",
    "IOB2": "B-X I-X B-X O B-Y I-Y I-Y B-X",
    "BIOES": "B-X E-X S-X O B-Y I-Y E-Y S-X",
    "BILOU": "B-X L-X U-X O B-Y I-Y L-Y U-X",
}
ENTITIES = [("X", 0, 2), ("X", 2, 3), ("Y", 4, 7), ("X", 7, 8)]


@pytest.mark.parametrize(("scheme", "labels"), WRITTEN.items(), ids=WRITTEN)
def test_schemes(scheme: str, labels: str) -> None:
    assert recognise([labels.split()]) == scheme
    assert repaired(labels.split(), scheme) == labels.split()
    assert entities(labels.split(), scheme) == ENTITIES


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [
        (["DT NN", "PRP$ VBZ -LRB-"], "none"),
        (["N V S I"], "none"),
        (["B I O O"], "IOB2"),
        (["S O"], "BIOES"),
        (["O O"], "IOB2"),
        (["I-X O", "O I-Y I-X"], "IOB1"),
        (["I-X B-X", "O I-X"], "IOB1"),
        (["B-X O", "O I-X"], "IOB2"),
        (["B-X B-X I-X"], "IOB2"),
        (["B-X E-X", "U-X"], "BIOES"),
        (["B-X", "M-X"], "IOB2"),
    ],
)
def test_recognise(sequences: list[str], expected: str) -> None:
    assert recognise([labels.split() for labels in sequences]) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("O B-PER I-PER B-LOC I-LOC", "IOB2"),
        ("O B-PER I-PER I-LOC", "IOB1"),
        ("O B-PER I-PER X [CLS]", "IOB2"),
        ("O B-PER I-PER E-PER S-PER", "BIOES"),
        ("O B-PER I-PER L-PER U-PER", "BILOU"),
        ("LABEL_0 LABEL_1", "none"),
    ],
)
def test_recognise_names(names: str, expected: str) -> None:
    assert recognise_names(names.split()) == expected


@pytest.mark.parametrize(
    ("scheme", "labels", "expected"),
    [
        ("IOB2", "O I-X I-X I-Y", "O B-X I-X B-Y"),
        ("IOB2", "I O", "B O"),
        ("IOB1", "B-X I-X O B-X B-X B-Y", "I-X I-X O I-X B-X I-Y"),
        ("BIOES", "I-X I-X O B-X O E-X E-X I-Y", "B-X E-X O S-X O S-X S-X S-Y"),
        ("BIOES", "B-X I-X B-X I-X E-Y", "B-X E-X B-X E-X S-Y"),
        ("BILOU", "L-X B-X I-X L-X I-X", "U-X B-X I-X L-X U-X"),
    ],
)
def test_repaired(scheme: str, labels: str, expected: str) -> None:
    assert repaired(labels.split(), scheme) == expected.split()


def test_names() -> None:
    assert kinds_of(["O", "B-y", "I-creative-work", "U"]) == ["", "creative-work", "y"]
    assert tags(["", "X"], "BIOES") == ("O", "B", "I", "E", "S", "B-X", "I-X", "E-X", "S-X")
    assert [is_tag(label, "IOB2") for label in ("O", "I", "B-X", "E-X", "B_X", "B-", "O-X", "Other", "")] == [
        *[True] * 3,
        *[False] * 6,
    ]


@pytest.mark.parametrize(
    ("scheme", "labels", "expected"),
    [
        ("IOB2", "I-X B-X I-X I-Y O B", [("X", 1, 3), ("_", 5, 6)]),
        ("IOB1", "B-X I-X I-Y", [("X", 1, 2), ("Y", 2, 3)]),
        ("BIOES", "B-X I-X O S-X E-X", [("X", 3, 4)]),
        ("IOB2", "B-X [CLS] B-X", [("X", 0, 1), ("X", 2, 3)]),
    ],
)
def test_strict_entities(scheme: str, labels: str, expected: list[tuple[str, int, int]]) -> None:
    assert entities(labels.split(), scheme) == expected


@pytest.mark.parametrize("scheme", SCHEMES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_repair_is_what_lenient_readers_see(scheme: str, data: st.DataObject) -> None:
    from seqeval.metrics.sequence_labeling import get_entities

    names = ["O", *(f"{prefix}-{kind}" for prefix in SCHEMES[scheme] for kind in "XY")]
    labels = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=12))
    once = repaired(labels, scheme)
    assert repaired(once, scheme) == once
    assert [label == "O" for label in once] == [label == "O" for label in labels]
    if scheme != "IOB1":  # in which seqeval reads half of B-X I-X after O
        assert set(entities(labels, scheme)) <= set(entities(once, scheme))
    if scheme in ("IOB1", "IOB2"):
        assert entities(once, scheme) == [(kind, start, end + 1) for kind, start, end in get_entities(labels)]
