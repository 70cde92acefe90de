"""Measures against their formulas."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from bert_fast.tasks.measures import class_measures, multi_label_measures, number_measures

DRAWS = np.random.default_rng(5)


def f1_of(truth: np.ndarray, found: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN); 0 where nothing is there."""
    right, wrong = np.sum(truth & found), np.sum(truth ^ found)
    return float(2 * right / (2 * right + wrong)) if right else 0.0


def test_classes() -> None:
    truth = DRAWS.integers(0, 3, 50)
    shares = DRAWS.dirichlet((1, 1, 1, 1), 50)
    found = shares.argmax(1)
    each = [f1_of(truth == i, found == i) for i in range(4)]
    assert class_measures(list(truth), shares, list("abcd")) == pytest.approx(
        {
            "accuracy": np.mean(truth == found),
            "f1_macro": np.mean(each),  # of all four, also of the one that is in no text
            "f1_weighted": np.dot(each, np.bincount(truth, minlength=4)) / 50,
        }
    )


def test_two_classes() -> None:
    truth = DRAWS.integers(0, 2, 61)
    scores = DRAWS.random(61)
    found = scores > 0.5
    measures = class_measures(list(truth), np.stack([1 - scores, scores], 1), ["no", "yes"])
    yes = truth == 1
    pairs = scores[yes][:, None] - scores[~yes]
    table = np.array([np.sum((truth == i) & (found == j)) for i in (0, 1) for j in (0, 1)], np.float64)
    tn, fp, fn, tp = table
    assert measures["f1"] == pytest.approx(f1_of(yes, found))
    assert measures["roc_auc"] == pytest.approx(np.mean(pairs > 0))
    assert measures["matthews"] == pytest.approx(
        (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    )


@pytest.mark.parametrize("right", [0, 1])
def test_one_class_in_all_texts(right: int) -> None:
    measures = class_measures([1, 1, 1], np.eye(2)[[right] * 3], ["no", "yes"])
    assert measures["accuracy"] == measures["f1"] == right
    assert measures["matthews"] == 0
    assert "roc_auc" not in measures
    assert np.isfinite(list(measures.values())).all()


def test_several_classes() -> None:
    truth = DRAWS.random((40, 3)) < 0.4
    truth[:, 2] = False
    shares = DRAWS.random((40, 3))
    shares[0, 0] = 0.7  # which is enough
    found = shares >= 0.7
    assert multi_label_measures(truth.astype(float), shares, 0.7) == pytest.approx(
        {
            "f1_micro": f1_of(truth.ravel(), found.ravel()),
            "f1_macro": np.mean([f1_of(truth[:, i], found[:, i]) for i in range(3)]),
            "accuracy": np.mean((truth == found).all(1)),
        }
    )


def test_numbers() -> None:
    x = DRAWS.normal(size=30)
    y = np.exp(x) + DRAWS.normal(size=30)
    ranks = np.array([np.argsort(np.argsort(values)) for values in (x, y)])
    assert number_measures(list(x), list(y)) == pytest.approx(
        {
            "spearman": np.corrcoef(ranks)[0, 1],
            "pearson": np.corrcoef(x, y)[0, 1],
            "mse": np.mean((x - y) ** 2),
            "mae": np.mean(abs(x - y)),
        }
    )


@pytest.mark.parametrize(("truth", "found"), [([1.0], [2.0]), ([1.0, 2.0], [3.0, 3.0]), ([1.0, 1.0], [0.0, 2.0])])
def test_no_correlation_of_constants(truth: list[float], found: list[float]) -> None:
    measures = number_measures(truth, found)
    assert measures["spearman"] == measures["pearson"] == 0
    assert measures["mae"] > 0
