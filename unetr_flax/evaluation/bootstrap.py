"""Bootstrap intervals of means over cases (Efron 1979), by the percentile method."""

import numpy as np

CONFIDENCE = 0.95
# Largest number of weights that are in memory at once, in bytes.
_CHUNK = 2**25


def bootstrap_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Computes means over cases that are drawn anew, with replacement.

    Every quantity sees the same draws, so means of quantities can be combined draw by draw.

    Args:
      values: [cases, quantities], nan where a case has no value; such a case is left out of that
        quantity's mean. Infinite values make the mean infinite.
      resamples: number of draws.
      seed: seed of the draws.

    Returns:
      [resamples, quantities], nan where no drawn case has a value.
    """
    cases = len(values)
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, values.shape[1]))
    step = max(1, _CHUNK // (8 * max(cases, 1)))
    for start in range(0, resamples, step):
        rows = slice(start, min(start + step, resamples))
        # How often each case was drawn.
        weights = rng.multinomial(cases, np.full(cases, 1 / cases), rows.stop - rows.start)
        means[rows] = weighted_means(values, weights.astype(np.float64))
    return means


def weighted_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Computes means over cases, each counted as often as its weight says.

    Args:
      values: [cases, quantities]; nan is left out, and infinity makes a mean infinite.
      weights: [draws, cases], 0 or more.

    Returns:
      [draws, quantities], nan where no case with a weight has a value.
    """
    number = weights @ ~np.isnan(values)
    total = weights @ np.where(np.isfinite(values), values, 0)
    for infinity in (np.inf, -np.inf):
        total[(weights @ (values == infinity)) > 0] = infinity
    return np.divide(total, number, out=np.full(number.shape, np.nan), where=number > 0)


def interval(means: np.ndarray, confidence: float = CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lower and upper end of the percentile interval of each quantity.

    An end is always one of the means, as between a finite and an infinite one there is nothing to
    interpolate.

    Args:
      means: [resamples, quantities], of `bootstrap_means`; nan is left out.
      confidence: fraction of the means that lies in the interval.

    Returns:
      Two arrays [quantities], nan where all means are nan.
    """
    ends = np.full((2, means.shape[1]), np.nan)
    for column in range(means.shape[1]):
        present = means[:, column][~np.isnan(means[:, column])]
        if len(present):
            tail = (1 - confidence) / 2
            ends[:, column] = np.quantile(present, [tail, 1 - tail], method="inverted_cdf")
    return ends[0], ends[1]
