"""Sampling a token from logits: temperature, exact top-k, top-p, a seed.

    sampler = Sampler(temperature=0.8, top_k=50, top_p=0.95, seed=1)
    token = sampler(logits)        # (vocab,) -> int
    tokens = sampler(logits)       # (batch, vocab) -> int64 (batch,)

The filters apply in the usual order, and each renormalises what it keeps:
  1. temperature divides the logits; 0 takes the largest logit and draws nothing;
  2. top_k keeps exactly k tokens, the largest; ties go to the lower id;
  3. top_p keeps the fewest tokens, largest first, whose probabilities sum to at least p; ties as above.

A draw inverts the cumulative distribution in order of token id, in float64, with one double per row from
`numpy.random.Generator(numpy.random.PCG64(seed))`. No step depends on the number of threads: the same logits and seed
give the same tokens on every machine (unless a draw is within rounding, 1e-15, of a boundary).
"""

import sys
from numbers import Integral, Real

import numpy as np

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))  # their names take 40 us to find, between two tokens
_FLOOR = -700.0  # nats below the largest logit where a weight becomes 0: exp is up to 100 times slower further down
_BLOCK = 256  # weights per partial sum
_BINS = 1024  # of the nucleus's histogram
_REACH = 40.0  # nats below the largest logit that the histogram resolves: a weight below that is at most e**-40


def check_sampling(temperature=1.0, top_k=None, top_p=None, seed=None) -> None:
    """Raises a ValueError, one line, for a setting outside its range."""
    if not (_is_a(Real, temperature) and 0 <= temperature <= sys.float_info.max):
        raise ValueError(f"temperature must be 0 or more (0 is greedy), got {temperature!r}")
    if top_k is not None and not (_is_a(Integral, top_k) and top_k >= 1):
        raise ValueError(f"top_k must be 1 or more, got {top_k!r}")
    if top_p is not None and not (_is_a(Real, top_p) and 0 < top_p <= 1):
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p!r}")
    if seed is not None and not (_is_a(Integral, seed) and seed >= 0):
        raise ValueError(f"seed must be 0 or more, got {seed!r}")


def _is_a(kind, value) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


class Sampler:
    """Settings and a random generator; call it with one row of logits or a batch of rows."""

    def __init__(self, temperature=1.0, top_k=None, top_p=None, seed=None):
        check_sampling(temperature, top_k, top_p, seed)
        self.temperature = float(temperature)
        self.top_k = top_k
        self.top_p = 1.0 if top_p is None else float(top_p)
        self._random = np.random.Generator(np.random.PCG64(seed))

    def __call__(self, logits) -> "int | np.ndarray":
        logits = np.asarray(logits)
        if logits.dtype not in _DTYPES:
            name = logits.dtype.name  # whatever the byte order
            if name in ("float16", "bfloat16"):
                logits = logits.astype(np.float32)  # exact, and NumPy partitions it faster
            elif name not in ("float32", "float64"):
                raise ValueError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
        if logits.ndim not in (1, 2) or logits.shape[-1] == 0:
            raise ValueError(f"logits must have shape (vocab,) or (batch, vocab), got {logits.shape}")
        rows = logits if logits.ndim == 2 else logits[None]
        if not np.isfinite(rows.max(axis=-1)).all():  # the largest is NaN where any is
            raise ValueError("logits must hold no NaN and no +inf, and at least one finite value per row")
        if self.temperature == 0:
            tokens = rows.argmax(axis=-1)
        else:
            draws = self._random.random(len(rows))
            tokens = np.array([self._pick(row, draw) for row, draw in zip(rows, draws, strict=True)], dtype=np.int64)
        return int(tokens[0]) if logits.ndim == 1 else tokens

    def _pick(self, row: np.ndarray, draw: float) -> int:
        if self.top_k is None or self.top_k >= len(row):
            return self._pick_from(row, draw)
        ids = _largest(row, self.top_k)
        return int(ids[self._pick_from(row[ids], draw)])

    def _pick_from(self, row: np.ndarray, draw: float) -> int:
        with np.errstate(over="ignore"):  # a tiny temperature sends all but the largest to -inf, as it should
            scaled = np.subtract(row, row.max(), dtype=np.float64)
            scaled /= self.temperature
        np.maximum(scaled, _FLOOR, out=scaled)
        weights = np.exp(scaled)
        weights *= scaled > _FLOOR
        if self.top_p < 1:
            weights *= _nucleus(scaled, weights, self.top_p * weights.sum())
        return _invert(weights, draw)


def _largest(row: np.ndarray, k: int) -> np.ndarray:
    """The ids, ascending, of the k largest values; ties go to the lower ids."""
    edge = np.partition(row, len(row) - k)[len(row) - k]
    keep = row > edge
    ties = np.flatnonzero(row == edge)
    keep[ties[: k - np.count_nonzero(keep)]] = True
    return np.flatnonzero(keep)


def _nucleus(scaled: np.ndarray, weights: np.ndarray, goal: float) -> np.ndarray:
    """True for the fewest tokens, largest first, whose weights sum to at least goal.

    Sorting 50,257 values would take longer than everything else. A histogram finds the one bin in which the cumulative
    weight, from the largest value down, reaches the goal: higher bins are kept whole, and only that bin is searched.
    """
    top = scaled.max()
    reach = min(top - scaled.min(), _REACH)
    if len(scaled) <= _BINS or reach < 1e-290:  # where _BINS / reach would overflow
        order = np.argsort(-scaled, kind="stable")
        keep = np.zeros(len(scaled), bool)
        keep[order[: np.searchsorted(weights[order].cumsum(), goal) + 1]] = True
        return keep
    bins = top - scaled
    bins *= _BINS / reach
    np.minimum(bins, _BINS - 1, out=bins)
    bins = bins.astype(np.int64)
    mass = np.bincount(bins, weights, _BINS).cumsum()
    edge = min(np.searchsorted(mass, goal), _BINS - 1)
    keep = bins < edge
    crossing = np.flatnonzero(bins == edge)
    if len(crossing):
        keep[crossing] = _nucleus(scaled[crossing], weights[crossing], goal - (mass[edge - 1] if edge else 0.0))
    return keep


def _invert(weights: np.ndarray, draw: float) -> int:
    """The first id whose cumulative weight exceeds draw * total; partial sums per block, as cumsum alone is slower."""
    blocks = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK)).cumsum()
    point = min(draw * blocks[-1], np.nextafter(blocks[-1], 0))  # below the total despite rounding
    block = np.searchsorted(blocks, point, side="right")
    within = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum()
    point = min(point - (blocks[block - 1] if block else 0.0), np.nextafter(within[-1], 0))
    return int(block * _BLOCK + np.searchsorted(within, point, side="right"))
