"""The jitted sampler against the loop that it replaces: crop, run the whole model, take the last row."""

from contextlib import contextmanager
from dataclasses import astuple, replace
from functools import partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_nanogpt.model import GPT, GPTConfig, init_params
from jax_nanogpt.sampler import Engine, Sampling, choose, generate
from shared.sampling import Sampler
from tests.jax.reference import forward

pytestmark = pytest.mark.engine

CONFIG = GPTConfig(block_size=40, vocab_size=60, n_layer=1, n_head=2, n_embd=32)
PARAMS = init_params(CONFIG, jax.random.key(0))
for name in PARAMS.keys() - {"wte", "wpe", "ln_f"}:  # as fresh, the tied head says the last token again and again
    PARAMS[name] = jax.tree.map(lambda p: 20 * p if p.ndim > 1 else p, PARAMS[name])
GREEDY = Sampling(temperature=0)
DRAWS = 4000
jit_choose = jax.jit(choose)


def naive(prompt, new_tokens, config=CONFIG, params=PARAMS):
    """nanoGPT's generate, greedy and without a cache, padded on the right so that it compiles once."""
    text, rows = list(prompt), []
    for _ in range(new_tokens):
        window = text[-config.block_size :]
        padded = np.zeros((1, config.block_size), np.int32)
        padded[0, : len(window)] = window
        rows.append(forward(config, params, padded)[0, len(window) - 1])
        text.append(int(rows[-1].argmax()))
    return text[len(prompt) :], np.array(rows)


def run(prompt, new_tokens, samples=1, sampling=GREEDY, seed=0, config=CONFIG, params=PARAMS):
    chunks = list(generate(GPT(config), params, prompt, new_tokens, samples, sampling, seed, kept=samples))
    tokens, logits = (np.concatenate(part, axis=1) for part in zip(*chunks, strict=True))
    return tokens, logits


@pytest.mark.parametrize("prompt_length", [1, 7, 39, 40, 100])
def test_greedy_equals_the_naive_loop_before_and_past_the_edge(prompt_length):
    prompt = np.random.default_rng(prompt_length).integers(60, size=prompt_length).tolist()
    expected, expected_rows = naive(prompt, 70)
    assert len(set(expected)) > 9
    tokens, rows = run(prompt, 70, samples=2)
    assert tokens.tolist() == [expected, expected]
    np.testing.assert_allclose(rows[0], expected_rows, atol=1e-3)


@pytest.mark.parametrize(("prompt_length", "new_tokens"), [(1, 63), (60, 5), (127, 5)])
def test_the_cache_is_long_enough_in_a_context_of_more_than_its_64_slots(prompt_length, new_tokens):
    config = replace(CONFIG, block_size=200)
    params = PARAMS | {"wpe": jax.random.normal(jax.random.key(1), (200, 32))}
    prompt = np.random.default_rng(0).integers(60, size=prompt_length).tolist()
    expected, expected_rows = naive(prompt, new_tokens, config, params)
    tokens, rows = run(prompt, new_tokens, config=config, params=params)
    assert tokens[0].tolist() == expected
    np.testing.assert_allclose(rows[0], expected_rows, atol=1e-3)


def test_token_by_token_the_engine_has_the_logits_of_the_loop_before_and_past_the_edge():
    prompts = np.random.default_rng(0).integers(60, size=(2, 30))
    engine = Engine(GPT(CONFIG), PARAMS, jax.devices("cpu")[0])
    tokens, expected = map(np.concatenate, zip(*(run(prompt.tolist(), 20) for prompt in prompts), strict=True))
    rows = [engine.prefill(prompts), *map(engine.decode, tokens.T[:-1])]
    np.testing.assert_allclose(np.stack(rows, axis=1), expected, atol=1e-4)


@contextmanager
def compilations():
    """Yields a list with an item for each program that is compiled."""
    compiled = []

    def listen(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(about)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_text_takes_four_programs_which_serve_every_length_seed_temperature_and_top_p():
    config = replace(CONFIG, n_embd=24)  # unlike other tests'
    params = init_params(config, jax.random.key(0))

    def sample(new_tokens, temperature, top_p, seed):
        list(generate(GPT(config), params, [1, 2, 3], new_tokens, 2, Sampling(temperature, 5, top_p), seed))

    with compilations() as compiled:
        sample(100, 0.8, 0.9, 1)
    assert 0 < len(compiled) <= 4
    with compilations() as compiled:
        for new_tokens, temperature, top_p, seed in (99, 0.5, 0.8, 2), (70, 0, 0.9, 2**40), (62, 1, 1.0, 3):
            sample(new_tokens, temperature, top_p, seed)
    assert compiled == []


def test_for_one_position_the_last_block_computes_no_other():
    """Of 32 positions in a block, 31 need their keys and values alone: a quarter of its products."""
    model, window = GPT(replace(CONFIG, vocab_size=1)), np.zeros((1, 32), np.int32)
    params = PARAMS | {"wte": PARAMS["wte"][:1]}
    one, every = (
        jax.jit(partial(model.apply, only=only)).lower({"params": params}, window).cost_analysis()["flops"]
        for only in (31, None)
    )
    assert one < every / 2


def test_the_logits_of_the_kept_texts_alone_leave_the_device():
    for kept in 0, 1:  # the first 38 tokens with the cache, the others past it
        chunks = list(generate(GPT(CONFIG), PARAMS, [1, 2, 3], 50, samples=3, kept=kept))
        assert [logits.shape for _, logits in chunks] == [(kept, tokens.shape[1], 60) for tokens, _ in chunks]


def test_seeds_that_differ_in_high_bits_alone_are_different():
    texts = {tuple(run([1], 8, sampling=Sampling(1.0, None), seed=seed)[0][0]) for seed in (5, 5 + 2**32, 5 + 2**40)}
    assert len(texts) == 3


@pytest.mark.parametrize(("prompt_length", "position"), [(3, 3), (50, 50)])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_overflow_are_an_error_which_names_the_position(prompt_length, position, temperature):
    params = PARAMS | {"ln_f": jax.tree.map(lambda p: p * 1e38, PARAMS["ln_f"]), "wte": PARAMS["wte"] * 1000}
    with pytest.raises(FloatingPointError, match=f"^NaN or inf in the logits at position {position}$"):
        run([1] * prompt_length, 2, sampling=Sampling(temperature), params=params)


def test_a_sample_is_the_same_alone_and_in_a_batch():
    """Five tokens with the cache, three past it."""
    prompt, sampling = list(range(35)), Sampling(1.0, 20, 0.9)
    few, _ = run(prompt, 8, samples=2, sampling=sampling, seed=5)
    many, _ = run(prompt, 8, samples=4, sampling=sampling, seed=5)
    assert few.tolist() == many[:2].tolist()
    assert len({tuple(sample) for sample in many.tolist()}) == 4


def probabilities(logits, sampling):
    """What the sampler draws from, in NumPy: temperature, top-k, top-p, ties to the lower id."""
    logits, temperature, top_k, top_p = np.array(logits), *astuple(sampling)
    order = np.argsort(-logits, kind="stable")[:top_k]
    weights = np.exp((logits - logits.max())[order] / temperature)
    weights = weights[: np.searchsorted(weights.cumsum() / weights.sum(), top_p or 1.0) + 1]
    exact = np.zeros(len(logits))
    exact[order[: len(weights)]] = weights / weights.sum()
    return exact


def frequencies(logits, sampling, draws=DRAWS):
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (draws, 1))
    tokens = jit_choose(rows, sampling, jax.random.split(jax.random.key(0), draws))
    return np.bincount(tokens, minlength=len(logits)) / draws


@settings(max_examples=15, deadline=None)
@given(
    logits=st.lists(st.integers(-4, 4), min_size=6, max_size=6),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.sampled_from([None, 1, 3, 6, 10]),
    top_p=st.sampled_from([None, 0.01, 0.3, 0.7, 1.0]),
)
def test_choice_has_the_distribution_of_the_shared_sampler(logits, temperature, top_k, top_p):
    """Small whole numbers: many ties, which must fall to the lower id on both sides."""
    exact = probabilities(logits, Sampling(temperature, top_k, top_p))
    rows = np.tile(np.float32(logits), (DRAWS, 1))
    shared = np.bincount(Sampler(temperature, top_k, top_p, seed=0)(rows), minlength=6) / DRAWS
    for found in (frequencies(logits, Sampling(temperature, top_k, top_p)), shared):
        assert not found[exact == 0].any()
        np.testing.assert_allclose(found, exact, atol=0.05)


@pytest.mark.parametrize("sampling", [Sampling(1.0, None), Sampling(2.0, 3)])
def test_each_position_of_each_sample_is_a_draw_of_its_own(sampling):
    """A model whose logits are the same everywhere; 7 tokens are generated with the cache, and 9 past it."""
    logits = [0.0, -1.0, 0.5, -2.0, 1.0, -0.5]
    config = replace(CONFIG, block_size=8, vocab_size=len(logits))
    params = jax.tree.map(jnp.zeros_like, init_params(config, jax.random.key(0)))
    params["ln_f"]["bias"] = params["ln_f"]["bias"].at[0].set(1)
    params["wte"] = params["wte"].at[:, 0].set(jnp.array(logits))
    tokens, rows = run([0], 16, 3000, sampling, config=config, params=params)
    np.testing.assert_allclose(rows, np.broadcast_to(logits, rows.shape), atol=1e-6)
    exact = probabilities(logits, sampling)
    for position in range(16):
        found = np.bincount(tokens[:, position], minlength=6) / 3000
        np.testing.assert_allclose(found, exact, atol=0.04)
    alike = pytest.approx((exact**2).sum(), abs=0.05)  # how often two independent draws agree
    for one, other in combinations(range(16), 2):
        assert (tokens[:, one] == tokens[:, other]).mean() == alike
    assert (tokens[1:] == tokens[:-1]).mean() == alike
    assert (tokens == run([0], 16, 3000, sampling, 1, config, params)[0]).mean() == alike


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.2500001, 2), (0.5, 2), (0.75, 3), (0.7500001, 4), (1.0, 4)])
def test_top_p_that_a_sum_equals_keeps_no_token_more(top_p, kept):
    """Four equal logits: each probability is exactly a quarter."""
    found = frequencies([0, 0, 0, 0], Sampling(1.0, None, top_p))
    assert (found > 0).tolist() == [True] * kept + [False] * (4 - kept)


def test_greedy_and_ties_take_the_lower_id():
    assert frequencies([1, 5, 5, 0], GREEDY).tolist() == [0, 1, 0, 0]
    assert frequencies([5, 5, 5, 5], Sampling(1.0, 1, None)).tolist() == [1, 0, 0, 0]
    assert frequencies([0, 300, 200, -300], Sampling(1e-30, None, None)).tolist() == [0, 1, 0, 0]
