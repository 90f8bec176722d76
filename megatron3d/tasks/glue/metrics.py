"""The official metrics of GLUE, computed by scikit-learn and scipy.

Source: Wang et al. 2018 (arXiv:1804.07461), section 3 and table 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron3d.errors import ConfigError, install_extra


def measure(
    names: Sequence[str], predictions: NDArray[np.generic], labels: NDArray[np.generic], *, num_classes: int
) -> dict[str, float]:
    """Each metric of `names` by its name, as a share (accuracy, F1) or a coefficient from -1 to 1 (the others).

    F1 is that of class 1 where there are two classes, and the mean over the classes else. A correlation of values that
    are all alike does not exist and counts as 0, as scikit-learn has it for Matthews' coefficient.

    Args:
        names: of `tasks.METRICS`.
        predictions: [N] classes, int64, or values.
        labels: [N], likewise.
        num_classes: classes of the task; 1 for values.

    Raises:
        ConfigError: scikit-learn or scipy is not installed.
    """
    sklearn_metrics, stats = _libraries()

    def correlation(function: Any) -> float:
        if float(np.ptp(predictions)) == 0.0 or float(np.ptp(labels)) == 0.0 or len(labels) < 2:
            return 0.0
        return float(function(predictions, labels).statistic)

    average = "binary" if num_classes == 2 else "macro"
    compute = {
        "accuracy": lambda: sklearn_metrics.accuracy_score(labels, predictions),
        "f1": lambda: sklearn_metrics.f1_score(labels, predictions, average=average, zero_division=0.0),
        "matthews": lambda: sklearn_metrics.matthews_corrcoef(labels, predictions),
        "pearson": lambda: correlation(stats.pearsonr),
        "spearman": lambda: correlation(stats.spearmanr),
    }
    return {name: float(compute[name]()) for name in names}


def mean_of(metrics: Mapping[str, float]) -> float:
    """The score of a task, the mean of its metrics, as on the leaderboard."""
    return math.fsum(metrics.values()) / len(metrics)


def over_seeds(runs: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and sample standard deviation of each metric over several runs; the deviation of one run is 0."""
    columns = {name: np.array([run[name] for run in runs]) for name in runs[0]}
    means = {name: float(values.mean()) for name, values in columns.items()}
    spread = {name: float(values.std(ddof=1)) if len(values) > 1 else 0.0 for name, values in columns.items()}
    return means, spread


def require_libraries() -> None:
    """Raises: ConfigError where scikit-learn or scipy is missing, before an hour of training is spent."""
    _libraries()


def _libraries() -> tuple[Any, Any]:
    try:
        import scipy.stats
        import sklearn.metrics
    except ImportError as error:
        raise ConfigError(
            f"the metrics of GLUE need scikit-learn and scipy, and {error.name} is not installed; "
            f"run: {install_extra('glue')}"
        ) from error
    return sklearn.metrics, scipy.stats
