"""Sampling a token from logits: temperature, exact top-k, top-p, a seed.

    sampler = Sampler(temperature=0.8, top_k=50, top_p=0.95, seed=1)
    token = sampler(logits)        # (vocab,) -> int
    tokens = sampler(logits)       # (batch, vocab) -> int64 (batch,)

The filters apply in the usual order, and each leaves a distribution that the next one sees renormalised:
  1. temperature divides the logits; 0 takes the largest logit and draws nothing;
  2. top_k keeps exactly k tokens, the largest; of equal ones, those with the lower id;
  3. top_p keeps the fewest tokens, largest first, whose probabilities sum to at least p; ties as above.

The draw is the inverse of the cumulative distribution in order of token id, in float64, at one double a row
from `numpy.random.Generator(numpy.random.PCG64(seed))`. No step depends on the number of threads, so the same
logits and seed give the same tokens everywhere (unless a draw falls within rounding, 1e-15, of a boundary).
"""

import operator
import sys

import numpy as np

_FLOOR = -700.0  # nats below the largest logit where a weight is 0: exp is up to 100 times slower further down
_BLOCK = 256
_BINS = 1024  # of the nucleus's histogram
_NEGLIGIBLE = 1e-290  # a difference of logits too small to make bins of
_REACH = 40.0  # nats below the largest logit that it resolves: what lies further down weighs e**-40 at most


def check_sampling(temperature=1.0, top_k=None, top_p=None, seed=None) -> None:
    """Raise a ValueError, in one line, for a setting outside its range."""
    if not (_is_number(temperature) and 0 <= temperature <= sys.float_info.max):
        raise ValueError(f"temperature must be a number of at least 0 (0 is greedy), not {temperature!r}")
    if top_k is not None and not (_is_whole(top_k) and top_k >= 1):
        raise ValueError(f"top_k must be a whole number of at least 1, not {top_k!r}")
    if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p!r}")
    if seed is not None and not (_is_whole(seed) and seed >= 0):
        raise ValueError(f"seed must be a whole number of at least 0, not {seed!r}")


class Sampler:
    """Settings and a random generator; call it with one row of logits or a batch of rows."""

    def __init__(self, temperature=1.0, top_k=None, top_p=None, seed=None):
        check_sampling(temperature, top_k, top_p, seed)
        self.temperature = float(temperature)
        self.top_k = top_k
        self.top_p = 1.0 if top_p is None else float(top_p)
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._room = np.empty((4, 0))  # fresh pages for each row would cost more than the arithmetic

    def __call__(self, logits) -> "int | np.ndarray":
        logits = np.asarray(logits)
        if logits.dtype.name in ("float16", "bfloat16"):
            logits = logits.astype(np.float32)  # exact, and NumPy partitions it faster
        if logits.dtype.name not in ("float32", "float64"):
            raise ValueError(f"logits must be float16, bfloat16, float32 or float64, not {logits.dtype}")
        if logits.ndim not in (1, 2) or logits.shape[-1] == 0:
            raise ValueError(f"logits must have the shape (vocab,) or (batch, vocab), not {logits.shape}")
        rows = np.atleast_2d(logits)
        if not np.isfinite(rows.max(axis=-1)).all():  # the largest is NaN where any is
            raise ValueError("logits must hold no NaN and no +inf, and at least one value above -inf a row")
        if self.temperature == 0:
            tokens = rows.argmax(axis=-1)
        else:
            draws = self._random.random(len(rows))
            tokens = np.array([self._pick(row, draw) for row, draw in zip(rows, draws, strict=True)], dtype=np.int64)
        return int(tokens[0]) if logits.ndim == 1 else tokens

    def _pick(self, row: np.ndarray, draw: float) -> int:
        ids = None
        if self.top_k is not None and self.top_k < len(row):
            ids = _largest(row, self.top_k)
            row = row[ids]
        if self._room.shape[1] < len(row):
            self._room = np.empty((4, len(row)))
        scaled, weights, *spare = self._room[:, : len(row)]
        with np.errstate(over="ignore"):  # a tiny temperature sends all but the largest to -inf, as it should
            np.subtract(row, row.max(), out=scaled, dtype=np.float64)
            scaled /= self.temperature
        np.maximum(scaled, _FLOOR, out=scaled)
        np.exp(scaled, out=weights)
        weights *= scaled > _FLOOR
        if self.top_p < 1:
            weights *= _nucleus(scaled, weights, self.top_p * weights.sum(), *spare)
        place = _invert(weights, draw)
        return int(place if ids is None else ids[place])


def _largest(row: np.ndarray, k: int) -> np.ndarray:
    """The ids, ascending, of the k largest values; of equal ones the lower ids."""
    edge = np.partition(row, len(row) - k)[len(row) - k]
    keep = row > edge
    ties = np.flatnonzero(row == edge)
    keep[ties[: k - np.count_nonzero(keep)]] = True
    return np.flatnonzero(keep)


def _nucleus(scaled, weights, goal: float, *spare) -> np.ndarray:
    """True for the fewest tokens, largest first, whose weights reach the goal.

    Sorting 50,257 values would cost more than all the rest. A histogram of them finds the one bin, from the largest
    down, in which the mass crosses the goal: what lies above it is in, and that bin alone is looked at more closely.
    """
    top = scaled.max()
    reach = min(top - scaled.min(), _REACH)
    if len(scaled) <= _BINS or reach < _NEGLIGIBLE:
        order = np.argsort(-scaled, kind="stable")
        keep = np.zeros(len(scaled), bool)
        keep[order[: np.searchsorted(weights[order].cumsum(), goal) + 1]] = True
        return keep
    places, bins = spare or np.empty((2, len(scaled)))
    bins = bins.view(np.int64)
    np.subtract(top, scaled, out=places)
    places *= _BINS / reach
    np.minimum(places, _BINS - 1, out=places)
    np.copyto(bins, places, casting="unsafe")  # rounds down
    mass = np.bincount(bins, weights, _BINS).cumsum()
    edge = min(np.searchsorted(mass, goal), _BINS - 1)
    keep = bins < edge
    crossing = np.flatnonzero(bins == edge)
    if len(crossing):
        keep[crossing] = _nucleus(scaled[crossing], weights[crossing], goal - (mass[edge - 1] if edge else 0.0))
    return keep


def _invert(weights: np.ndarray, draw: float) -> int:
    """The first id at which the cumulative weight passes the share `draw` of the total: by blocks, then inside one."""
    blocks = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK)).cumsum()
    point = min(draw * blocks[-1], np.nextafter(blocks[-1], 0))  # below the total, also once it is rounded
    block = np.searchsorted(blocks, point, side="right")
    within = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum()
    point = min(point - (blocks[block - 1] if block else 0.0), np.nextafter(within[-1], 0))
    return block * _BLOCK + np.searchsorted(within, point, side="right")


def _is_number(value) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _is_whole(value) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, (bool, np.bool_))
