"""What many scores say together: a mean, and where it lies.

Knows nothing of what was scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 10_000
CONFIDENCE = 0.95
_DRAWS_AT_ONCE = 10_000_000
"""Numbers that the bootstrap holds at once."""


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Percentile bootstrap interval (Efron 1979) of the mean: `RESAMPLES` resamples at `CONFIDENCE`, fixed seed.

    Returns:
        Its ends; None for fewer than two values, which say nothing of their spread.
    """
    if len(values) < 2:
        return None
    found = bootstrap(
        (np.asarray(values, dtype=np.float64),),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, _DRAWS_AT_ONCE // len(values)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def estimate(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean with its interval, and median; None without values."""
    if not values:
        return None
    ends = interval(values)
    return {
        "n": len(values),
        "mean": fmean(values),
        "low": ends[0] if ends else None,
        "high": ends[1] if ends else None,
        "median": median(values),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the percentiles 10 and 90, of one value or more."""
    low, high = np.percentile(values, (10, 90)).tolist()
    return {"median": median(values), "p10": low, "p90": high}
