"""The figures of merit, as GLUE defines them: every one is better the higher it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

Metric = Callable[[np.ndarray, np.ndarray], float]
"""Takes predictions and labels, `[N]` each: class numbers, or numbers of a regression."""

CORRELATIONS = frozenset({"pearson", "spearman"})


def _correlation(function: Callable[[np.ndarray, np.ndarray], Any]) -> Metric:
    def metric(predictions: np.ndarray, labels: np.ndarray) -> float:
        # Constant predictions have no correlation. They are worth nothing, which 0 says; NaN would hide the run.
        if np.ptp(predictions) == 0 or np.ptp(labels) == 0 or not np.isfinite(predictions).all():
            return 0.0
        return float(function(predictions, labels)[0])

    return metric


METRICS: dict[str, Metric] = {
    "accuracy": lambda predictions, labels: float(accuracy_score(labels, predictions)),
    # Of class 1, as GLUE has it for pairs that mean the same.
    "f1": lambda predictions, labels: float(f1_score(labels, predictions, zero_division=0)),
    "macro_f1": lambda predictions, labels: float(f1_score(labels, predictions, average="macro", zero_division=0)),
    "matthews": lambda predictions, labels: float(matthews_corrcoef(labels, predictions)),
    "pearson": _correlation(pearsonr),
    "spearman": _correlation(spearmanr),
}


def check_metrics(names: Sequence[str], classes: int) -> None:
    """Check that metrics exist and fit the labels.

    Args:
        names: Names of metrics.
        classes: Number of classes; 0 for regression.

    Raises:
        ValueError: One is unknown or does not fit.
    """
    for name in names:
        if name not in METRICS:
            raise ValueError(f"`metrics` must be among {', '.join(METRICS)}, got {name!r}.")
        if (name in CORRELATIONS) != (classes == 0) or (name == "f1" and classes != 2):
            labels = f"{classes} classes" if classes else "numbers"
            raise ValueError(f"`metrics` must fit the labels, which are {labels}, got {name!r}.")
    if not names:
        raise ValueError("`metrics` must name at least one metric, got none.")


def measure(names: Sequence[str], predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Evaluate metrics.

    Args:
        names: Names of metrics.
        predictions: Class numbers or numbers, `[N]`.
        labels: The same of the truth, `[N]`.

    Returns:
        The value of each metric, by name.
    """
    return {name: METRICS[name](predictions, labels) for name in names}
