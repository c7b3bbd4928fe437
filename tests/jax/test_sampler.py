"""The jitted sampler against the loop that it replaces: crop, run the whole model, take the last row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_nanogpt.model import GPT, GPTConfig, init_params
from jax_nanogpt.sampler import CHUNK, Sampling, choose, generate
from shared.sampling import Sampler

CONFIG = GPTConfig(block_size=40, vocab_size=60, n_layer=2, n_head=2, n_embd=32)
PARAMS = init_params(CONFIG, jax.random.key(0))
for name in PARAMS.keys() - {"wte", "wpe", "ln_f"}:  # as fresh, the tied head says the last token again and again
    PARAMS[name] = jax.tree.map(lambda p: 20 * p if p.ndim > 1 else p, PARAMS[name])
GREEDY = Sampling(temperature=0)
FORWARD = jax.jit(GPT(CONFIG).apply)


def naive(prompt, new_tokens):
    """nanoGPT's generate, greedy and without a cache, padded on the right so that it compiles once."""
    text, rows = list(prompt), []
    for _ in range(new_tokens):
        window = text[-CONFIG.block_size :]
        padded = np.zeros((1, CONFIG.block_size), np.int32)
        padded[0, : len(window)] = window
        rows.append(FORWARD({"params": PARAMS}, padded)[0][0, len(window) - 1])
        text.append(int(rows[-1].argmax()))
    return text[len(prompt) :], np.array(rows)


def run(prompt, new_tokens, samples=1, sampling=GREEDY, seed=0):
    pieces = list(generate(CONFIG, PARAMS, prompt, new_tokens, samples, sampling, seed))
    tokens, logits = (np.concatenate(part, axis=1) for part in zip(*pieces, strict=True))
    return tokens, logits


@pytest.mark.parametrize("prompt_length", [1, 7, 39, 40, 41, 100])
def test_greedy_equals_the_naive_loop_before_and_past_the_edge(prompt_length):
    prompt = np.random.default_rng(prompt_length).integers(60, size=prompt_length).tolist()
    expected, expected_rows = naive(prompt, 70)
    assert len(set(expected)) > 9
    tokens, rows = run(prompt, 70, samples=2)
    assert tokens.tolist() == [expected, expected]
    np.testing.assert_allclose(rows[0], expected_rows, atol=1e-3)


@pytest.mark.parametrize("new_tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 40])
def test_as_many_tokens_come_as_were_asked_for(new_tokens):
    tokens, rows = run([3], new_tokens)
    assert tokens.shape == (1, new_tokens) and rows.shape == (1, new_tokens, 60)
    assert tokens[0].tolist() == run([3], 60)[0][0, :new_tokens].tolist()


def test_a_sample_is_the_same_alone_and_in_a_batch():
    sampling = Sampling(1.0, 20, 0.9)
    few, _ = run([1, 2, 3], 60, samples=2, sampling=sampling, seed=5)
    many, _ = run([1, 2, 3], 60, samples=4, sampling=sampling, seed=5)
    assert few.tolist() == many[:2].tolist()
    assert len({tuple(sample) for sample in many.tolist()}) == 4
    assert few.tolist() != run([1, 2, 3], 60, samples=2, sampling=sampling, seed=6)[0].tolist()


def frequencies(logits, sampling, draws=20000):
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (draws, 1))
    tokens = choose(rows, sampling, jax.random.split(jax.random.key(0), draws))
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
    order = np.argsort(-np.array(logits), kind="stable")[:top_k]
    weights = np.exp((np.array(logits) - max(logits))[order] / temperature)
    weights = weights[: np.searchsorted(weights.cumsum() / weights.sum(), top_p or 1.0) + 1]
    exact = np.zeros(6)
    exact[order[: len(weights)]] = weights / weights.sum()
    rows = np.tile(np.float32(logits), (20000, 1))
    shared = np.bincount(Sampler(temperature, top_k, top_p, seed=0)(rows), minlength=6) / 20000
    for found in (frequencies(logits, Sampling(temperature, top_k, top_p)), shared):
        assert not found[exact == 0].any()
        np.testing.assert_allclose(found, exact, atol=0.02)


def test_greedy_and_ties_take_the_lower_id():
    assert frequencies([1, 5, 5, 0], GREEDY).tolist() == [0, 1, 0, 0]
    assert frequencies([5, 5, 5, 5], Sampling(1.0, 1, None)).tolist() == [1, 0, 0, 0]
    assert frequencies([0, 300, 200, -300], Sampling(1e-30, None, None)).tolist() == [0, 1, 0, 0]
