"""Confidence intervals of means over prompts."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from packforcing.extras import optional_imports

RESAMPLES, LEVEL = 10_000, 0.95  # of the bootstrap


class Estimate(msgspec.Struct, frozen=True):
    """A mean over prompts and its confidence interval.

    Attributes:
        low: Lower end of the 95% interval; None for one prompt.
        high: Upper end.
        prompts: Number of values.
    """

    mean: float
    low: float | None
    high: float | None
    prompts: int


def estimate_mean(values: Sequence[float]) -> Estimate | None:
    """Estimate a mean by the percentile bootstrap over the values.

    The draws are seeded, so equal values have equal intervals.

    Args:
        values: One value per prompt.

    Returns:
        The mean with its interval, or None where there are no values.
    """
    if not values:
        return None
    sample = np.asarray(values, np.float64)
    mean = float(sample.mean())
    if len(sample) == 1:
        return Estimate(mean, None, None, 1)
    with optional_imports("comparing videos", "evaluate"):
        from scipy.stats import bootstrap
    interval = bootstrap(
        (sample,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), len(sample))
