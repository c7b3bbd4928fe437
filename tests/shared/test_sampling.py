"""shared/sampling.py against exact distributions, transformers' warpers and a plain sort."""

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shared.sampling import Sampler, _nucleus, check_sampling

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 50257


def normal_logits(seed=0, shape=(VOCAB,), scale=3.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def as_bfloat16(logits):
    """The values that bfloat16 keeps, as float32: many of them equal."""
    return logits.astype(ml_dtypes.bfloat16).astype(np.float32)


class Draws:
    """A generator that gives these numbers, over and over."""

    def __init__(self, *draws):
        self.draws = np.array(draws)

    def random(self, n):
        return np.resize(self.draws, n)


FIRST, LAST = Draws(0.0), Draws(np.nextafter(1, 0))  # the smallest and the largest double that the generator can give


def draw_with(generator, logits, **settings):
    sampler = Sampler(**settings)
    sampler._random = generator
    return sampler(logits)


def counts(logits, draws=2000, **settings):
    """How often evenly spaced draws give each token: its probability times their number, within one."""
    grid = Draws(*(np.arange(draws) + 0.5) / draws)
    return np.bincount(draw_with(grid, np.tile(logits, (draws, 1)), **settings), minlength=len(logits))


def distribution(logits, temperature=1.0, top_k=None, top_p=None):
    """The definition, word for word, by sorting."""
    logits = logits.astype(np.float64) / temperature
    order = np.argsort(-logits, kind="stable")[:top_k]
    weights = np.exp(logits[order] - logits.max())
    weights /= weights.sum()
    if top_p is not None:
        weights = weights[: np.searchsorted(weights.cumsum(), top_p) + 1]
    exact = np.zeros(len(logits))
    exact[order[: len(weights)]] = weights / weights.sum()
    return exact


def assert_draws_follow(exact, logits, **settings):
    found = counts(logits, **settings)
    assert found[exact == 0].sum() == 0
    assert np.abs(found - 2000 * exact).max() < 1.001


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 3.0},
        {"top_k": 5},
        {"top_k": 40},
        {"top_k": 10**9},
        {"top_p": 0.8},
        {"top_p": 1.0},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["distinct", "ties"])
def test_draws_follow_the_exact_distribution(kind, settings):
    logits = normal_logits(1, (40,), 1.5)
    logits = logits if kind == "distinct" else np.round(logits)
    assert_draws_follow(distribution(logits, **settings), logits, **settings)


@pytest.mark.parametrize(("top_k", "top_p"), [(1, None), (7, None), (40, None), (None, 0.3), (None, 0.97), (30, 0.6)])
def test_draws_follow_the_probabilities_of_transformers(top_k, top_p):
    torch = pytest.importorskip("torch")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for seed in range(3):
        logits = normal_logits(seed, (50,), 0.4)
        scores = TemperatureLogitsWarper(0.9)(None, torch.tensor(logits)[None])
        scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        scores = TopPLogitsWarper(top_p)(None, scores) if top_p else scores
        exact = torch.softmax(scores[0].double(), dim=0).numpy()
        assert_draws_follow(exact, logits, temperature=0.9, top_k=top_k, top_p=top_p)


@pytest.mark.parametrize("vocab", [3, 255, 256, 257, 2000])
def test_draws_reach_every_part_of_the_vocabulary(vocab):
    assert (counts(np.zeros(vocab, np.float32), vocab) == 1).all()


@pytest.mark.parametrize("copies", [1, 500], ids=["by a sort", "by a histogram"])
@pytest.mark.parametrize("reached", [1, 2, 3, 6])
def test_a_nucleus_whose_sum_is_exactly_p_ends_there(copies, reached):
    """With powers of two, whose sums are exact, in random order."""
    weights = np.repeat([8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.25], copies)
    order = np.random.default_rng(0).permutation(len(weights))
    scaled = np.log2(weights) - 3
    goal = weights[: reached * copies].sum()
    kept = _nucleus(scaled[order], weights[order], goal)
    assert sorted(weights[order][kept], reverse=True) == [*weights[: reached * copies]]
    one_more = _nucleus(scaled[order], weights[order], np.nextafter(goal, np.inf))
    assert np.count_nonzero(one_more) == np.count_nonzero(kept) + 1


@pytest.mark.parametrize("vocab", [8, 4096])
@pytest.mark.parametrize("p", [0.125, 0.25, 0.5, 0.75])
def test_top_p_keeps_exactly_its_share_of_equal_logits_like_transformers(vocab, p):
    logits = np.append(np.zeros(vocab), np.full(vocab, -60.0))  # the second half weighs too little to count
    assert draw_with(LAST, logits, top_p=p) == p * vocab - 1
    torch = pytest.importorskip("torch")
    from transformers import TopPLogitsWarper

    assert TopPLogitsWarper(p)(None, torch.zeros(1, vocab)).isfinite().sum() == p * vocab


@pytest.mark.parametrize("scale", [1e-6, 0.01, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("odd", [None, -np.inf, -100.0, 50.0], ids=str)
def test_the_nucleus_of_a_large_vocabulary_is_that_of_a_sort(scale, odd):
    """A histogram's worst cases: values far apart, close together, and both at once."""
    logits = normal_logits(9, (20_000,), scale)
    if odd is not None:
        logits[::50] = odd
    for top_p in (0.1, 0.9, 0.999):
        exact = distribution(logits, top_p=top_p)
        scaled = logits.astype(np.float64) - logits.max()
        kept = _nucleus(np.maximum(scaled, -700), np.exp(scaled), top_p * np.exp(scaled).sum())
        assert np.count_nonzero(kept != (exact > 0)) <= 1  # the sum is rounded, at the edge


rows = arrays(
    np.float32,
    st.integers(1, 60),
    elements=st.one_of(
        st.sampled_from([-np.inf, -1e30, -800.0, 0.0, 1.0, 1.0]), st.floats(-50, 50, width=16)
    ),  # coarse values, so that many are equal
).filter(lambda row: np.isfinite(row.max()))


@given(rows, st.sampled_from([0.01, 0.5, 1.0, 2.0]), st.integers(1, 70), st.floats(0.01, 1.0))
def test_nothing_outside_the_definition_is_ever_drawn(logits, temperature, top_k, top_p):
    exact = distribution(logits, temperature, top_k, min(top_p + 1e-9, 1.0))
    drawn = Sampler(temperature, top_k, top_p, seed=0)(np.tile(logits, (50, 1)))
    assert (exact[drawn] > 0).all()


@given(rows, st.integers(1, 70), st.sampled_from([None, 0.5, 0.9]))
def test_a_batch_gives_what_its_rows_give_one_by_one(logits, top_k, top_p):
    batch = np.stack([logits, logits[::-1], logits])
    before = batch.copy()
    one_by_one = Sampler(1.0, top_k, top_p, seed=5)
    assert Sampler(1.0, top_k, top_p, seed=5)(batch).tolist() == [one_by_one(row) for row in batch]
    assert (batch == before).all()


def test_temperature_zero_is_the_first_of_the_largest_and_draws_nothing():
    sampler = Sampler(temperature=0, seed=1)
    assert sampler(np.array([1.0, 3.0, 3.0])) == 1
    assert sampler(np.array([[1.0, 3.0, 3.0], [9.0, 3.0, -np.inf]])).tolist() == [1, 0]
    assert sampler._random.random() == Sampler(seed=1)._random.random()


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 0.01])
def test_a_temperature_near_zero_is_greedy(temperature):
    logits = np.array([0.0, 3.0, 2.0, -np.inf], np.float32)
    assert counts(logits, temperature=temperature).tolist() == [0, 2000, 0, 0]


@pytest.mark.parametrize("settings", [{}, {"top_k": 500}, {"top_p": 0.999}], ids=str)
def test_a_masked_token_is_never_drawn_even_at_the_edge(settings):
    logits = np.full(1000, -np.inf)
    logits[[300, 301]] = 0.0
    assert draw_with(FIRST, logits, **settings) == 300
    assert draw_with(LAST, logits, **settings) == 301


@pytest.mark.parametrize("vocab", [200, 256, 257, 1000])
def test_the_largest_draw_is_never_beyond_the_last_token(vocab):
    for seed in range(100):
        logits = normal_logits(seed, (vocab,))
        assert draw_with(LAST, logits) < vocab
        assert draw_with(LAST, logits, top_k=vocab // 2) < vocab


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1.0, 1e306, sys.float_info.max])
@pytest.mark.parametrize("logits", [[0, 5e-324], [-1.7e308, 1.7e308], [3e38, -3e38, 0.0], [1.0]], ids=str)
def test_extreme_numbers_give_a_token(logits, temperature):
    for size in (1, 2000):
        row = np.tile(np.array(logits, np.float64), size)
        assert Sampler(temperature, top_p=0.5, seed=0)(row) in range(len(row))


def test_the_generator_is_the_documented_one():
    """The inverse of the cumulative distribution, one double per row from PCG64(seed)."""
    logits = normal_logits(4, (1000,), 1.0)
    draws = np.random.Generator(np.random.PCG64(11)).random(200)
    expected = np.searchsorted(distribution(logits).cumsum(), draws, side="right").tolist()
    sampler = Sampler(seed=11)
    assert [sampler(logits) for _ in draws] == expected
    assert Sampler()(np.tile(logits, (200, 1))).tolist() != Sampler()(np.tile(logits, (200, 1))).tolist()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ">f4"], ids=str)
def test_every_float_type_gives_the_token_of_its_exact_values(dtype):
    logits = normal_logits(5, (4, 3000)).astype(dtype)
    settings = {"temperature": 0.8, "top_k": 100, "top_p": 0.9, "seed": 3}
    assert Sampler(**settings)(logits).tolist() == Sampler(**settings)(logits.astype(np.float64)).tolist()


TOO_LARGE, NAN = 10**400, float("nan")


@pytest.mark.parametrize(
    ("setting", "message", "values"),
    [
        ("temperature", "temperature must be 0 or more (0 is greedy), got ", [-1, -1e-9, TOO_LARGE, NAN, "hot", None]),
        ("top_k", "top_k must be 1 or more, got ", [0, -3, 1.5, "5", True, NAN]),
        ("top_p", "top_p must be above 0 and at most 1, got ", [0, -0.1, 1.0000001, NAN, "most", True]),
        ("seed", "seed must be 0 or more, got ", [-1, 0.5, "x", False]),
    ],
)
def test_a_setting_out_of_range_is_named_with_what_is_allowed(setting, message, values):
    for value in values:
        for build in (check_sampling, Sampler):
            with pytest.raises(ValueError) as error:
                build(**{setting: value})
            assert str(error.value) == message + repr(value)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [[-np.inf] * 3, [0, np.inf, 1]], ids=["all -inf", "+inf"])
def test_logits_without_a_distribution_are_refused(temperature, bad):
    for logits in (bad, [[0.0, 1.0, 2.0], bad]):
        with pytest.raises(ValueError, match="logits must hold no NaN"):
            Sampler(temperature)(np.array(logits, np.float32))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize("nan", [np.nan, -np.nan], ids=["nan", "-nan"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_single_nan_is_found_wherever_it_is(dtype, nan, temperature):
    for place in (0, 1, VOCAB // 2, VOCAB - 1):
        logits = np.zeros((2, VOCAB), dtype)
        logits[1, place] = nan
        for rows in (logits, logits[1]):
            with pytest.raises(ValueError, match="logits must hold no NaN"):
                Sampler(temperature)(rows)


@pytest.mark.parametrize(
    "logits",
    [np.zeros((0,)), np.zeros((2, 0)), np.zeros(()), np.zeros((1, 2, 3)), [1, 2], ["a"], np.zeros(3, np.longdouble)],
)
def test_logits_of_another_shape_or_type_are_refused(logits):
    with pytest.raises(ValueError, match="^logits must "):
        Sampler()(logits)


def test_an_empty_batch_gives_no_tokens():
    assert Sampler()(np.zeros((0, 5))).shape == (0,)


@pytest.mark.parametrize("kind", ["normal", "nearly flat", "steep", "padded with -inf", "coarse"])
@pytest.mark.parametrize("settings", [{"top_k": 1000}, {"top_p": 0.95}, {"top_k": 4000, "top_p": 0.95}], ids=str)
def test_a_row_of_gpt2_is_never_sorted_whole(kind, settings, monkeypatch):
    """Sorting would take longer than everything else; each kind of row has been slow with some method."""
    logits = normal_logits(8, scale={"nearly flat": 0.01, "steep": 10.0}.get(kind, 3.0))
    if kind == "padded with -inf":
        logits[-47:] = -np.inf
    if kind == "coarse":
        logits = as_bfloat16(logits)
    sizes = []

    def count(sort):
        return lambda values, *more, **others: sizes.append(np.size(values)) or sort(values, *more, **others)

    for name in ("sort", "argsort", "lexsort", "unique"):
        monkeypatch.setattr(np, name, count(getattr(np, name)))
    Sampler(temperature=0.8, seed=0, **settings)(logits)
    assert sum(sizes) <= 1024


def test_exp_is_not_computed_where_it_is_slow(monkeypatch):
    """Beyond -700 it takes up to a hundred times longer, and gives 0."""
    lowest = []
    exp = np.exp
    monkeypatch.setattr(np, "exp", lambda values, **more: lowest.append(values.min()) or exp(values, **more))
    Sampler(seed=0)(np.array([0.0, -690.0, -740.0, -1e6, -np.inf]))
    assert lowest == [-700.0]


DRAW = (
    "import numpy as np; from shared.sampling import Sampler;"
    "logits = 3 * np.random.default_rng(0).normal(size=(50, 50257)).astype(np.float32);"
    "tokens = Sampler(0.9, 4000, 0.95, seed=1)(logits).tolist()"
)


def test_neither_threads_nor_the_cpus_instructions_change_a_token():
    """NumPy in the other process has two threads and none of the instructions that it would choose here."""
    umath = np._core._multiarray_umath
    here = [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__.get(name)]
    environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(here), "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    command = [sys.executable, "-c", f"{DRAW}; print(tokens)"]
    result = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    drawn = {}
    exec(DRAW, drawn)
    assert result.stdout == f"{drawn['tokens']}\n", result.stderr
