"""Tags that write entities word by word: their schemes, what may follow what, and the entities in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

__all__ = [
    "Scheme",
    "entities",
    "is_tag",
    "kinds_of",
    "recognise",
    "recognise_names",
    "repaired",
    "seqeval_scheme",
    "tags",
]

Scheme = Literal["IOB1", "IOB2", "BIOES", "BILOU"]

Entity: TypeAlias = "tuple[str, int, int]"
"""Type, first word, the word after the last."""

TAG = re.compile(r"([BIESLU])(?:-(.+))?")

# Without O; the tag of a single word is the last of four.
PREFIXES: dict[str, str] = {"IOB1": "BI", "IOB2": "BI", "BIOES": "BIES", "BILOU": "BILU"}
IN_SEQEVAL: dict[str, str] = {"IOB1": "IOB1", "IOB2": "IOB2", "BIOES": "IOBES", "BILOU": "BILOU"}
OPEN = "BI"  # after these an entity may go on


def is_tag(label: str, scheme: str) -> bool:
    """Whether a label is O or, with or without a type, one of the scheme's: B, I-PER ..."""
    match = TAG.fullmatch(label)
    return label == "O" or (match is not None and match[1] in PREFIXES[scheme])


def kinds_of(names: Iterable[str]) -> list[str]:
    """The types of entities in labels, sorted; "" is that of B and I without one."""
    return sorted({match[2] or "" for match in map(TAG.fullmatch, names) if match})


def tags(kinds: Iterable[str], scheme: str) -> tuple[str, ...]:
    """O and all tags of the types: a model has them all, though some may be missing from few examples."""
    return ("O", *(_tag(prefix, kind) for kind in kinds for prefix in PREFIXES[scheme]))


# ---- recognition -----------------------------------------------------------------------------------------------------


def recognise(sequences: Iterable[Sequence[str]]) -> str:
    """The scheme of labels in sentences; "none" where they are no tags, such as parts of speech.

    E or S: BIOES; L or U: BILOU. With B and I alone it is IOB1 (Ramshaw and Marcus 1995) where every B stands directly
    after an entity of its type and some entity begins with I; otherwise IOB2, or BIO, in which every entity begins
    with B.
    """
    seen = list(sequences)
    names = {label for labels in seen for label in labels}
    scheme = recognise_names(names)
    if scheme in ("IOB1", "IOB2"):
        fits = {name: all(repaired(labels, name) == list(labels) for labels in seen) for name in ("IOB1", "IOB2")}
        return "IOB1" if fits["IOB1"] and not fits["IOB2"] else "IOB2"
    return scheme


def recognise_names(names: Iterable[str]) -> str:
    """The scheme of labels as far as their names tell it: IOB1 where some type has I but no B, otherwise IOB2.

    They are tags if all of them look like tags, or one has a type, such as B-PER.
    """
    known = set(names)
    found = [match for match in map(TAG.fullmatch, known) if match]
    if not any(match[2] for match in found) and len(found) + ("O" in known) < len(known):
        return "none"
    prefixes = {match[1] for match in found}
    if prefixes & set("ES"):
        return "BIOES"
    if prefixes & set("LU"):
        return "BILOU"
    return "IOB1" if any(_tag("B", kind) not in known for kind in kinds_of(known)) else "IOB2"


# ---- transitions -----------------------------------------------------------------------------------------------------


def repaired(labels: Sequence[str], scheme: str) -> list[str]:
    """The labels with every tag that cannot follow what is before it made a beginning.

    Labels without impossible transitions stay as they are: in IOB2 I-X stands after B-X or I-X only; in IOB1 B-X only
    directly after an entity of type X; in BIOES and BILOU an entity is B-X, any number of I-X and E-X (L-X), or S-X
    (U-X) alone. An entity is then written from its beginning on as the scheme has it, so that in BIOES B-X before O
    becomes S-X. What is no tag of the scheme becomes O.
    """
    result = ["O"] * len(labels)
    last: Entity = ("", -1, -1)
    for entity in _runs(labels, scheme):
        kind, start, end = entity
        for word in range(start, end):
            result[word] = _tag(_prefix(entity, word, last, scheme), kind)
        last = entity
    return result


def _runs(labels: Sequence[str], scheme: str) -> Iterator[Entity]:
    """The entities, where whatever cannot go on with one begins another."""
    inside = PREFIXES[scheme][1:3]
    start, before = 0, ("O", "")
    for word, now in enumerate([*(_parts(label, scheme) for label in labels), ("O", "")]):
        goes_on = before[0] in OPEN and now[0] in inside and now[1] == before[1]
        if not goes_on:
            if before[0] != "O":
                yield before[1], start, word
            start = word
        before = now


def _prefix(entity: Entity, word: int, last: Entity, scheme: str) -> str:
    kind, start, end = entity
    if scheme == "IOB1":
        touches = start == last[2] and kind == last[0]
        return "B" if touches and word == start else "I"
    if scheme == "IOB2":
        return "B" if word == start else "I"
    if end - start == 1:
        return PREFIXES[scheme][3]
    return PREFIXES[scheme][0 if word == start else 2 if word == end - 1 else 1]


def _parts(label: str, scheme: str) -> tuple[str, str]:
    match = TAG.fullmatch(label)
    return (match[1], match[2] or "") if match and match[1] in PREFIXES[scheme] else ("O", "")


def _tag(prefix: str, kind: str) -> str:
    return f"{prefix}-{kind}" if kind else prefix


# ---- seqeval ---------------------------------------------------------------------------------------------------------


def seqeval_scheme(scheme: str) -> Any:
    """seqeval's class for a scheme.

    Raises:
        ImportError: seqeval is missing.
    """
    try:
        import seqeval.scheme
    except ImportError as error:
        raise ImportError("seqeval is missing; pip install 'bert-fast[tasks]'") from error
    return getattr(seqeval.scheme, IN_SEQEVAL[scheme])


def entities(labels: Sequence[str], scheme: str) -> list[Entity]:
    """The entities by seqeval's strict rule: what does not begin or end as the scheme has it is none.

    A type that is missing is "_", as in seqeval; what is no tag of the scheme counts as O.
    """
    from seqeval.scheme import Tokens

    known = [label if is_tag(label, scheme) else "O" for label in labels]
    return [(entity.tag, entity.start, entity.end) for entity in Tokens(known, seqeval_scheme(scheme)).entities]
