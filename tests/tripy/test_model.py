"""model.py, compiled, against transformers in float32; and what nvtripy itself says to wrong inputs."""

import numpy as np
import nvtripy as tp
import pytest
import torch
from transformers import GPT2LMHeadModel

from tripy_nanogpt import model
from tripy_nanogpt.model import GPT, GPTConfig, count_params, init_cache

pytestmark = pytest.mark.engine

IDS = np.random.default_rng(0).integers(60, size=16).tolist()
# how many steps of its dtype the largest logit may be off: there are a few dozen roundings between text and logits, one
# an operation in half precision, which is computed in float32, and one a product in float32
STEPS = {"float32": 64, "float16": 8, "bfloat16": 8}
one_dtype = pytest.mark.parametrize("dtype", ["float16"], indirect=True)  # for what does not depend on it


@pytest.fixture(scope="module")
def reference(tiny):
    """transformers' float32 logits at each position of IDS, (T, V)."""
    with torch.no_grad():
        return GPT2LMHeadModel.from_pretrained(tiny, dtype=torch.float32)(torch.tensor([IDS])).logits[0].numpy()


def steps(ours, exact, dtype):
    assert ours.dtype == np.float32 and ours.shape == exact.shape
    return abs(ours - exact).max() / abs(exact).max() / torch.finfo(getattr(torch, dtype)).eps


def test_logits_are_transformers_rounded_to_dtype_and_to_no_finer_one(engine, dtype, reference):
    assert 0.1 < steps(engine.forward([IDS])[0], reference, dtype) < STEPS[dtype]


@pytest.mark.parametrize("length", [1, 2, 8, 15, 16])
def test_lengths_to_the_edges_of_their_range(engine, reference, dtype, length):
    assert steps(engine.forward([IDS[:length]])[0], reference[:length], dtype) < STEPS[dtype]
    assert steps(engine.prefill([IDS[:length]])[0], reference[length - 1], dtype) < STEPS[dtype]


@pytest.mark.parametrize("length", [1, 5])
def test_each_decode_step_is_transformers_to_the_last_slot(engine, reference, dtype, length):
    rows = [engine.prefill([IDS[:length]]), *(engine.decode([token]) for token in IDS[length:])]
    assert steps(np.concatenate(rows), reference[length - 1 :], dtype) < STEPS[dtype]


def make_text(engine, ids, count, cached):
    """The greedy tokens."""
    tokens = []
    for step in range(count):
        if cached:
            logits = engine.decode(tokens[-1:]) if step else engine.prefill([ids])
        else:
            logits = engine.forward([ids + tokens])[:, -1]
        tokens.append(int(logits.argmax()))
    return tokens


def test_cached_equals_uncached_and_transformers_generate(tiny, engine, dtype):
    cached, uncached = (make_text(engine, IDS[:3], 13, cached) for cached in (True, False))
    assert cached == uncached
    if dtype == "float32":
        exact = GPT2LMHeadModel.from_pretrained(tiny, dtype=torch.float32)
        theirs = exact.generate(torch.tensor([IDS[:3]]), max_new_tokens=13, do_sample=False, eos_token_id=None)
        assert cached == theirs[0, 3:].tolist()


def test_a_decode_does_not_read_what_an_earlier_text_left_in_the_cache(engine, dtype):
    engine.prefill([IDS])  # all slots are filled
    engine.position = 4
    over_full = engine.decode([IDS[4]])
    engine.prefill([IDS[:4]])
    assert steps(over_full, engine.decode([IDS[4]]), dtype) < STEPS[dtype]


def test_gelu_is_the_tanh_approximation():
    x = torch.linspace(-6, 6, 200)
    ours = torch.from_dlpack(tp.copy(model.gelu(tp.Tensor(x)).eval(), tp.device("cpu")))
    torch.testing.assert_close(ours, torch.nn.functional.gelu(x, approximate="tanh"), atol=1e-6, rtol=1e-6)
    assert (ours - torch.nn.functional.gelu(x)).abs().max() > 1e-4


def test_gelu_survives_the_extremes_of_float16():
    x = torch.tensor([-6e4, -300.0, -40.0, 40.0, 300.0, 6e4], dtype=torch.float16)
    ours = torch.from_dlpack(tp.copy(model.gelu(tp.Tensor(x)).eval(), tp.device("cpu")))
    torch.testing.assert_close(ours, torch.relu(x))


def test_a_config_counts_its_parameters(tiny):
    theirs = GPT2LMHeadModel.from_pretrained(tiny)
    config = GPTConfig(block_size=16, vocab_size=60, n_layer=2, n_head=2, n_embd=32)
    assert count_params(config) == sum(parameter.numel() for parameter in theirs.parameters())
    assert round(count_params(GPTConfig()) / 1e6, 1) == 124.4


# -- what nvtripy says to wrong inputs


@one_dtype
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((1, 17), np.int32), r"Dimension 1 has a shape of 17.*\[1, 16\]"),
        (np.zeros((1, 0), np.int32), "Dimension 1 has a shape of 0"),
        (np.zeros((2, 4), np.int32), "Dimension 0 has a shape of 2"),
        (np.zeros((1, 4), np.float32), "expected data type: int32 but got: float32"),
    ],
)
@pytest.mark.parametrize("name", ["forward", "prefill"])
def test_wrong_tokens_are_named(engine, name, tokens, message):
    with pytest.raises(tp.TripyException, match=message):
        engine.executable(name)(tp.copy(tp.Tensor(tokens), tp.device("gpu")))


@one_dtype
def test_tokens_left_on_the_host_are_named(engine):
    with pytest.raises(tp.TripyException, match="expected to be on device: gpu but got: cpu"):
        engine.executable("forward")(tp.Tensor(np.array([IDS], np.int32)))


@one_dtype
def test_a_cache_of_another_shape_is_named(engine):
    token, position = (tp.copy(tp.Tensor(np.zeros(shape, np.int32)), tp.device("gpu")) for shape in ((1, 1), (1,)))
    short = [[tp.zeros((1, 2, 8, 16), dtype=tp.float16).eval()] * 2] * 2
    assert init_cache(engine.config)[0][0].shape_bounds.max == (1, 2, 16, 16)
    with pytest.raises(tp.TripyException, match=r"(?s)cache\[0\]\[0\].*Dimension 2 has a shape of 8"):
        engine.executable("decode")(token, position, short)


def test_parameters_of_another_dtype_or_shape_are_refused():
    gpt = GPT(GPTConfig(block_size=4, vocab_size=4, n_layer=1, n_head=1, n_embd=4, dtype=tp.float16))
    for wrong, message in (torch.ones(4, 4), "dtype"), (torch.ones(5, 4, dtype=torch.float16), "shape"):
        with pytest.raises(tp.TripyException, match=f"New parameter {message}"):
            gpt.load_state_dict({"lm_head.weight": tp.Tensor(wrong)}, strict=False)


def test_a_model_without_weights_does_not_compile():
    gpt = GPT(GPTConfig(block_size=4, vocab_size=4, n_layer=1, n_head=1, n_embd=4))
    with pytest.raises(tp.TripyException, match="never set"):
        tp.compile(gpt.forward, args=[tp.InputInfo((1, 4), dtype=tp.int32)])
