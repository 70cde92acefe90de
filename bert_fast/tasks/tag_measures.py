"""How right labels of words are, by seqeval and scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from .schemes import is_tag, repaired, seqeval_scheme

__all__ = ["entity_measures", "label_measures"]

Labels = Sequence[Sequence[str]]


def entity_measures(truth: Labels, found: Labels, scheme: str) -> dict[str, float]:
    """Micro-averaged precision, recall and F1 of entities, F1 of each type as "f1_PER", and accuracy of words.

    An entity is right if its type and both of its ends are. What does not begin or end as the scheme has it is no
    entity (seqeval's strict mode). conlleval, and seqeval without a scheme, also begin an entity at I-X after O or
    another type: "f1_lenient" is F1 where such tags of what was found are beginnings (schemes.repaired), so that with
    IOB1 and IOB2 it is what they count. What is no tag of the scheme counts as O.

    Args:
        truth: labels of each sentence.
        found: the same, predicted.
        scheme: of schemes.
    """
    strict, kinds = _scores(truth, found, scheme)
    lenient, _ = _scores(truth, [repaired(labels, scheme) for labels in found], scheme)
    return {**strict, "f1_lenient": lenient["f1"], "accuracy": _accuracy(truth, found), **kinds}


def label_measures(truth: Labels, found: Labels) -> dict[str, float]:
    """Accuracy of words, and macro F1 of the labels that are there in either."""
    from sklearn.metrics import f1_score

    names = list(chain.from_iterable(truth)), list(chain.from_iterable(found))
    return {
        "accuracy": _accuracy(truth, found),
        "f1_macro": float(f1_score(*names, average="macro", zero_division=0)),
    }


def _accuracy(truth: Labels, found: Labels) -> float:
    pairs = [pair for labels in zip(truth, found, strict=True) for pair in zip(*labels, strict=True)]
    return sum(right == label for right, label in pairs) / len(pairs)


def _scores(truth: Labels, found: Labels, scheme: str) -> tuple[dict[str, float], dict[str, float]]:
    """Of all entities, and F1 of each type."""
    kind = seqeval_scheme(scheme)
    from seqeval.metrics.v1 import precision_recall_fscore_support
    from seqeval.scheme import Entities

    rows = [
        [[label if is_tag(label, scheme) else "O" for label in labels] for labels in side] for side in (truth, found)
    ]
    both = [Entities(side, kind) for side in rows]
    options = {"scheme": kind, "zero_division": 0, "entities_true": both[0], "entities_pred": both[1]}
    total = precision_recall_fscore_support(*rows, average="micro", **options)
    each = precision_recall_fscore_support(*rows, average=None, **options)[2]
    names = sorted(both[0].unique_tags | both[1].unique_tags)
    return (
        {name: float(value) for name, value in zip(("precision", "recall", "f1"), total, strict=False)},
        {f"f1_{name}": float(value) for name, value in zip(names, each, strict=True)},
    )
