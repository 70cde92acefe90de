"""The measures of papers, by scikit-learn and SciPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["class_measures", "multi_label_measures", "number_measures"]

Array = np.ndarray[Any, Any]


def class_measures(truth: Sequence[int], shares: Array, labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, macro and weighted F1; of two classes also F1 of the second, Matthews' correlation and ROC AUC.

    The correlation is 0 where only one class is found and right; without texts of both there is no ROC AUC.

    Args:
        truth: the right class of each text.
        shares: (texts, classes), probabilities.
        labels: names of the classes.
    """
    from sklearn import metrics

    found = shares.argmax(-1)
    result = {
        "accuracy": metrics.accuracy_score(truth, found),
        "f1_macro": metrics.f1_score(truth, found, labels=range(len(labels)), average="macro", zero_division=0),
        "f1_weighted": metrics.f1_score(truth, found, average="weighted", zero_division=0),
    }
    if len(labels) == 2:
        result["f1"] = metrics.f1_score(truth, found, pos_label=1, zero_division=0)
        is_defined = len({*truth, *found.tolist()}) == 2
        result["matthews"] = metrics.matthews_corrcoef(truth, found) if is_defined else 0.0
        if len(set(truth)) == 2:
            result["roc_auc"] = metrics.roc_auc_score(truth, shares[:, 1])
    return {name: float(value) for name, value in result.items()}


def multi_label_measures(truth: Array, shares: Array, threshold: float) -> dict[str, float]:
    """Micro and macro F1, and the share of texts with exactly the right classes.

    Args:
        truth: (texts, classes), 1 where a text is of a class.
        shares: (texts, classes), probabilities.
        threshold: from which on a text is of a class.
    """
    from sklearn import metrics

    found = shares >= threshold
    return {
        "f1_micro": float(metrics.f1_score(truth, found, average="micro", zero_division=0)),
        "f1_macro": float(metrics.f1_score(truth, found, average="macro", zero_division=0)),
        "accuracy": float(metrics.accuracy_score(truth, found)),
    }


def number_measures(truth: Sequence[Any], found: Sequence[float]) -> dict[str, float]:
    """Spearman's and Pearson's correlation, the mean squared and the mean absolute error.

    A correlation is 0 where either side is constant or there are fewer than two texts.
    """
    from scipy import stats

    x, y = np.asarray(truth, np.float64), np.asarray(found, np.float64)
    is_defined = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    return {
        "spearman": float(stats.spearmanr(x, y).statistic) if is_defined else 0.0,
        "pearson": float(stats.pearsonr(x, y).statistic) if is_defined else 0.0,
        "mse": float(np.mean((x - y) ** 2)),
        "mae": float(np.mean(np.abs(x - y))),
    }
