"""The model and its loader against transformers' GPT-2."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from jax_nanogpt import weight_loader
from jax_nanogpt.model import GPT, GPTConfig, init_cache, init_params
from shared.tokenizer import gpt2_bpe, load_tokenizer

SHAPES = {  # name -> layers, heads, width; -large and -xl with fewer layers, for memory's sake
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (4, 20, 1280),
    "gpt2-xl": (3, 25, 1600),
}
TINY = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)


def random_checkpoint(folder, layers, heads, width, vocab=1000, positions=64):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocab, n_positions=positions, n_layer=layers, n_head=heads, n_embd=width
    )
    reference = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # as fresh, biases are 0 and norms 1: a loader that loses them would pass
        for parameter in reference.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    reference.save_pretrained(folder)
    return reference


def logits_of(reference, tokens):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return reference(torch.tensor(tokens)).logits.numpy()


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    random_checkpoint(folder, 2, 2, 32, vocab=50, positions=16)
    return folder


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_transformers(name, tmp_path):
    reference = random_checkpoint(tmp_path, *SHAPES[name])
    config, params = weight_loader.load(tmp_path)
    tokens = np.random.default_rng(0).integers(1000, size=(2, 64))
    logits, _ = jax.jit(GPT(config).apply)({"params": params}, tokens)
    np.testing.assert_allclose(logits, logits_of(reference, tokens), atol=1e-4, rtol=0)


def test_cropped_model_equals_the_reference_on_short_texts(tmp_path):
    reference = random_checkpoint(tmp_path, 2, 4, 128)
    config, params = weight_loader.crop(*weight_loader.load(tmp_path), 20)
    tokens = np.random.default_rng(0).integers(1000, size=(2, 20))
    logits, _ = GPT(config).apply({"params": params}, tokens)
    np.testing.assert_allclose(logits, logits_of(reference, tokens), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="block_size is 65, this checkpoint has 64"):
        weight_loader.crop(*weight_loader.load(tmp_path), 65)


def test_bfloat16_is_near_float32(tmp_path):
    random_checkpoint(tmp_path, 2, 4, 128)
    config, params = weight_loader.load(tmp_path)
    half_config, half = weight_loader.load(tmp_path, "bfloat16")
    tokens = np.random.default_rng(0).integers(1000, size=(2, 64))
    logits, _ = GPT(config).apply({"params": params}, tokens)
    rough, _ = GPT(half_config).apply({"params": half}, tokens)
    assert half_config.dtype == "bfloat16" and rough.dtype == jnp.float32
    assert 0 < np.abs(rough - logits).max() < 0.05


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_written_loads_in_transformers(bias, tmp_path):
    torch = pytest.importorskip("torch")
    config = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32, bias=bias)
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params)
    weight_loader.save(tmp_path, config, params)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = np.arange(16)[None]
    logits, _ = GPT(config).apply({"params": params}, tokens)
    np.testing.assert_allclose(logits, logits_of(reference, tokens), atol=1e-4, rtol=0)


def test_a_model_on_gpt2s_tokens_is_written_with_gpt2s_vocabulary(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"vocab_size": 50257}', encoding="utf-8"
    )  # how a dataset in GPT-2's tokens is known
    config = GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=2, n_embd=8)
    weight_loader.save(tmp_path / "out", config, init_params(config, jax.random.key(0)), tmp_path, 50256)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("hello world", "Grüße, 世界! 🙂\n\n  def f(x):\treturn 1"):
        ids = gpt2_bpe().encode(text)
        assert load_tokenizer(tmp_path / "out").encode(text) == reference(text)["input_ids"] == ids
    assert reference.eos_token_id == 50256


def test_saved_and_loaded_again_is_the_same_to_the_bit(tiny_folder, tmp_path):
    config, params = weight_loader.load(tiny_folder)
    weight_loader.save(tmp_path, config, params)
    again_config, again = weight_loader.load(tmp_path)
    assert again_config == config
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again))
    assert not list(tmp_path.glob("*.part"))


def test_a_checkpoint_in_shards_loads(tiny_folder, tmp_path):
    tensors = list(load_file(tiny_folder / "model.safetensors").items())
    save_file(dict(tensors[:9]), tmp_path / "model-00001-of-00002.safetensors")
    save_file(dict(tensors[9:]), tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    assert jax.tree.all(jax.tree.map(np.array_equal, weight_loader.load(tmp_path), weight_loader.load(tiny_folder)))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"n_inner": 7}, "n_inner is 7"),
        ({"n_head": 0}, "n_head is 0, a whole number from 1 to 16777216 is expected"),
        ({"n_head": 3}, "n_embd is 32, a multiple of n_head (3) is expected"),
        ({"n_layer": "4"}, "n_layer is '4', a whole number from 1 to 1000 is expected"),
        ({"n_embd": None}, "n_embd is None, a whole number from 1 to 16777216 is expected"),
        ({"n_layer": 10**9}, "n_layer is 1000000000, a whole number from 1 to 1000"),
        ({"n_layer": 3}, "12 tensors are missing: transformer.h.2.attn.c_attn.weight"),
        ({"vocab_size": 51}, "transformer.wte.weight has the shape (50, 32), (51, 32) is expected"),
    ],
)
def test_a_checkpoint_that_is_another_model_is_refused(change, complaint, tiny_folder, tmp_path):
    config = json.loads((tiny_folder / "config.json").read_text(encoding="utf-8")) | change
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes((tiny_folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=re.escape(complaint)):
        weight_loader.load(tmp_path)


def test_damaged_weights_are_refused_in_one_line(tiny_folder, tmp_path):
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ValueError, match="holds no model.safetensors"):
        weight_loader.load(tmp_path)
    whole = (tiny_folder / "model.safetensors").read_bytes()
    for damaged in (b"", whole[:100], whole[:-100]):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a readable safetensors file") as caught:
            weight_loader.load(tmp_path)
        assert "\n" not in str(caught.value)


def test_no_position_sees_a_later_one():
    params = init_params(TINY, jax.random.key(0))
    tokens = jnp.arange(16)[None]

    def loss_at(wpe, position):
        logits, _ = GPT(TINY).apply({"params": {**params, "wpe": wpe}}, tokens)
        return jnp.square(logits[0, position]).sum()

    for position in (0, 7, 15):
        reach = np.abs(jax.grad(loss_at)(params["wpe"], position)).sum(axis=1)
        assert (reach[: position + 1] > 0).all() and (reach[position + 1 :] == 0).all()


def test_one_token_at_a_time_with_a_cache_equals_all_at_once():
    params = init_params(TINY, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (3, 16), 0, 50)
    whole, _ = GPT(TINY).apply({"params": params}, tokens)
    step = jax.jit(GPT(TINY).apply)
    cache = init_cache(TINY, batch=3, slots=16)
    first, cache = step({"params": params}, tokens[:, :5], cache, 0)
    rows = [first]
    for position in range(5, 16):
        logits, cache = step({"params": params}, tokens[:, position : position + 1], cache, position)
        rows.append(logits)
    np.testing.assert_allclose(jnp.concatenate(rows, axis=1), whole, atol=1e-5)


def test_only_gives_the_one_row_of_logits():
    params = init_params(TINY, jax.random.key(0))
    tokens = jnp.arange(10)[None]
    whole, _ = GPT(TINY).apply({"params": params}, tokens)
    one, _ = GPT(TINY).apply({"params": params}, tokens, only=6)
    np.testing.assert_allclose(one, whole[:, 6:7], atol=1e-6)
