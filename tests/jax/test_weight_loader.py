"""Checkpoints cropped and exported. What a checkpoint may hold, and how it is read, is in tests/contract/odd.py."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from jax_nanogpt import weight_loader
from jax_nanogpt.checkpoint import Checkpoints
from jax_nanogpt.model import GPTConfig, init_params
from shared.tokenizer import Characters, gpt2_bpe, load_tokenizer
from tests.jax import reference

CONFIG = GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def params():
    fresh = init_params(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), fresh)


def test_a_cropped_model_is_the_same_on_short_texts(tmp_path):
    model = reference.random_checkpoint(tmp_path)
    loaded = weight_loader.load(tmp_path)
    config, params = weight_loader.crop(*loaded, 5)
    tokens = np.random.default_rng(0).integers(50, size=(2, 5))
    ours = reference.forward(config, params, tokens)
    np.testing.assert_allclose(ours, reference.logits_of(model, tokens), atol=1e-5)
    with pytest.raises(ValueError, match="block_size must be at most this checkpoint's 16, got 17"):
        weight_loader.crop(*loaded, 17)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_written_loads_in_transformers(dtype, params, tmp_path):
    weight_loader.save(tmp_path, CONFIG, params, dtype=dtype)
    assert {tensor.dtype.name for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert str(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype) == f"torch.{dtype}"
    tokens = np.arange(16)[None]
    ours = reference.forward(CONFIG, params, tokens)
    tolerance = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}[dtype]
    np.testing.assert_allclose(reference.logits_of(reference.load(tmp_path), tokens), ours, atol=tolerance)
    config, loaded = weight_loader.load(tmp_path, dtype)
    assert config == replace(CONFIG, dtype=dtype)
    assert jax.tree.all(jax.tree.map(lambda p, q: np.array_equal(p.astype(dtype), q), params, loaded))


def test_tensors_are_those_of_safetensors_at_addresses_that_jax_takes_over(tmp_path):
    arrays = {"a": np.arange(3, dtype=np.int8), "b": np.arange(99, dtype=np.float16), "c": np.ones((2, 0), np.float32)}
    arrays |= {"d": np.arange(6.0, dtype=np.float32).reshape(2, 3), "e": np.float64(7)[None], "f": np.zeros(5, bool)}
    save_file(arrays, tmp_path / "m.safetensors")
    loaded = weight_loader.load_file(tmp_path / "m.safetensors")
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array, strict=True)
    assert loaded["b"].ctypes.data % 64 == loaded["d"].ctypes.data % 64 == 0


def test_a_model_without_biases_is_written_with_zeros(params, tmp_path):
    config = replace(CONFIG, bias=False)
    for module in params["ln_f"], params["h_0"]["ln_1"], params["h_0"]["ln_2"], *params["h_0"]["attn"].values():
        del module["bias"]
    del params["h_0"]["mlp"]["c_fc"]["bias"], params["h_0"]["mlp"]["c_proj"]["bias"]
    weight_loader.save(tmp_path, config, params)
    tokens = np.arange(16)[None]
    expected = reference.logits_of(reference.load(tmp_path), tokens)
    np.testing.assert_allclose(reference.forward(config, params, tokens), expected, atol=1e-5)


def test_a_model_on_gpt2s_tokens_is_written_with_gpt2s_vocabulary(tmp_path):
    # a config.json of this size and nothing else is how a dataset in GPT-2's tokens is known
    (tmp_path / "config.json").write_text('{"vocab_size": 50257}', encoding="utf-8")
    config = GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=2, n_embd=8)
    weight_loader.save(tmp_path / "out", config, init_params(config, jax.random.key(0)), tmp_path, 50256)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("hello world", "Grüße, 世界! 🙂\n\n  def f(x):\treturn 1"):
        ids = gpt2_bpe().encode(text)
        assert load_tokenizer(tmp_path / "out").encode(text) == tokenizer(text)["input_ids"] == ids
    assert tokenizer.eos_token_id == transformers.AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == 50256


def test_an_export_is_the_best_checkpoint_with_its_tokenizer(params, tmp_path, capsys):
    Characters("ab\n").save(tmp_path)
    checkpoints = Checkpoints(tmp_path, "afresh")
    for step, loss in (10, 1.0), (20, 2.0):
        state = jax.tree.map(lambda p, step=step: p + step, params)
        checkpoints.save(step, state, {"count": np.zeros(1)}, {"model": vars(CONFIG)}, loss)
    weight_loader.main([f"--out_dir={tmp_path}", f"--to={tmp_path / 'exported'}"])
    config, exported = weight_loader.load(tmp_path / "exported")
    assert config == CONFIG and load_tokenizer(tmp_path / "exported").chars == "ab\n"
    np.testing.assert_array_equal(exported["wte"], params["wte"] + 10)
    assert not list(tmp_path.rglob("*.part"))
    assert capsys.readouterr().out == f"{tmp_path / 'exported'}: iteration 10, float32\n"
    with pytest.raises(SystemExit, match="2"):
        weight_loader.main([f"--out_dir={tmp_path / 'nowhere'}", f"--to={tmp_path}"])
    assert capsys.readouterr().err.count("\n") == 1
