"""model.py, compiled, against transformers in float32; and what nvtripy itself says to wrong inputs."""

import numpy as np
import nvtripy as tp
import pytest
import torch
from transformers import GPT2LMHeadModel

from shared.sampling import Sampler
from tripy_nanogpt import model
from tripy_nanogpt.model import GPT, GPTConfig

pytestmark = pytest.mark.engine

IDS = np.random.default_rng(0).integers(60, size=16).tolist()


# how many steps of its dtype the largest logit may be off: a few dozen roundings lie between text and logits, one an
# operation in half precision, which is computed in float32, and one a product in float32
STEPS = {"float32": 64, "float16": 8, "bfloat16": 8}
one_dtype = pytest.mark.parametrize("dtype", ["float16"], indirect=True)  # where each says the same


def steps(ours, exact, dtype):
    assert ours.dtype == np.float32 and ours.shape == exact.shape
    return abs(ours - exact).max() / abs(exact).max() / torch.finfo(getattr(torch, dtype)).eps


def close(ours, exact, dtype):
    assert steps(ours, exact, dtype) < STEPS[dtype]


def test_logits_are_transformers_rounded_to_dtype_and_to_no_finer_one(engine, dtype, reference):
    assert 0.1 < steps(engine.forward(IDS), reference(IDS), dtype) < STEPS[dtype]


@pytest.mark.parametrize("length", [1, 2, 8, 15, 16])
def test_lengths_to_the_edges_of_their_range(engine, reference, dtype, length):
    close(engine.forward(IDS[:length]), reference(IDS[:length]), dtype)
    close(engine.prefill(IDS[:length])[0], reference(IDS[:length])[-1], dtype)


@pytest.mark.parametrize("length", [1, 5])
def test_each_decode_step_is_transformers_to_the_last_slot(engine, reference, dtype, length):
    exact = reference(IDS)
    logits, cache = engine.prefill(IDS[:length])
    for position in range(length, 16):
        close(logits, exact[position - 1], dtype)
        logits, cache = engine.decode(IDS[position], position, cache)
    close(logits, exact[-1], dtype)


def test_cached_equals_uncached_and_transformers_generate(tiny, engine, dtype):
    cached, uncached = (
        [token for token, _ in engine.generate(IDS[:3], 13, Sampler(temperature=0), cached)] for cached in (True, False)
    )
    assert cached == uncached
    if dtype == "float32":
        exact = GPT2LMHeadModel.from_pretrained(tiny, dtype=torch.float32)
        theirs = exact.generate(torch.tensor([IDS[:3]]), max_new_tokens=13, do_sample=False, eos_token_id=None)
        assert cached == theirs[0, 3:].tolist()


def test_a_decode_does_not_see_what_an_earlier_text_left_in_the_cache(engine, dtype):
    _, cache = engine.prefill(IDS)  # all slots full
    long, _ = engine.decode(IDS[4], 4, cache)
    _, cache = engine.prefill(IDS[:4])
    short, _ = engine.decode(IDS[4], 4, cache)
    close(long, short, dtype)


@one_dtype
def test_text_ends_where_the_context_is_full(engine):
    for cached in (True, False):
        assert len(list(engine.generate(IDS[:10], 100, Sampler(temperature=0), cached))) == 7
        assert len(list(engine.generate(IDS, 100, Sampler(temperature=0), cached))) == 1


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
    assert config.count_parameters() == sum(parameter.numel() for parameter in theirs.parameters())
    assert round(GPTConfig().count_parameters() / 1e6, 1) == 124.4


# -- what nvtripy says


def executable(engine, name):
    engine.forward(IDS) if name == "forward" else engine.prefill(IDS)
    return engine._executables[name]


@one_dtype
def test_a_text_too_long_is_named_by_nvtripy(engine):
    with pytest.raises(tp.TripyException, match=r"Dimension 1 has a shape of 17.*\[1, 16\]"):
        engine.forward([*IDS, 1])


@one_dtype
def test_a_text_of_no_tokens_is_refused_by_nvtripy(engine):
    with pytest.raises(tp.TripyException, match=r"Dimension 1 has a shape of 0"):
        engine.prefill([])


@one_dtype
def test_tokens_of_another_dtype_are_named_by_nvtripy(engine):
    wrong = tp.copy(tp.Tensor(np.array([IDS], np.float32)), tp.device("gpu"))
    with pytest.raises(tp.TripyException, match="expected data type: int32 but got: float32"):
        executable(engine, "forward")(wrong)


@one_dtype
def test_tokens_left_on_the_host_are_named_by_nvtripy(engine):
    with pytest.raises(tp.TripyException, match="expected to be on device: gpu but got: cpu"):
        executable(engine, "forward")(tp.Tensor(np.array([IDS], np.int32)))


@one_dtype
def test_a_cache_of_another_shape_is_named_by_nvtripy(engine):
    _, cache = engine.prefill(IDS)
    short = tp.copy(tp.zeros((1, 2, 8, 16), dtype=engine.config.dtype).eval(), tp.device("cpu"))
    with pytest.raises(tp.TripyException, match=r"(?s)cache\[0\]\[0\].*Dimension 2 has a shape of 8"):
        engine.decode(1, 3, [tp.copy(short, tp.device("gpu")), *cache[1:]])


def test_parameters_of_another_dtype_or_shape_are_refused_by_nvtripy():
    gpt = GPT(GPTConfig(block_size=4, vocab_size=4, n_layer=1, n_head=1, n_embd=4, dtype=tp.float16))
    for wrong, complaint in (torch.ones(4, 4), "dtype"), (torch.ones(5, 4, dtype=torch.float16), "shape"):
        with pytest.raises(tp.TripyException, match=f"New parameter {complaint}"):
            gpt.load_state_dict({"lm_head.weight": tp.Tensor(wrong)}, strict=False)


def test_a_model_without_weights_does_not_compile():
    gpt = GPT(GPTConfig(block_size=4, vocab_size=4, n_layer=1, n_head=1, n_embd=4))
    with pytest.raises(tp.TripyException, match="never set"):
        tp.compile(gpt.forward, args=[tp.InputInfo((1, 4), dtype=tp.int32)])
