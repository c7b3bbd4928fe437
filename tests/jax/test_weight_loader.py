"""Checkpoints in Hugging Face's format: read as transformers reads them or refused, and written for it."""

import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
import reference
import transformers
from safetensors.numpy import load_file, save_file

from jax_nanogpt import weight_loader
from jax_nanogpt.model import GPTConfig, init_params
from jax_nanogpt.sampler import Sampling, generate
from shared.tokenizer import gpt2_bpe, load_tokenizer

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "transformer.wte.weight"
CONFIG = GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=16)  # of reference.random_checkpoint


@pytest.fixture
def params():
    fresh = init_params(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), fresh)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, reference.random_checkpoint(folder)


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A checkpoint that a test may change."""
    for name in "config.json", WHOLE:
        (tmp_path / name).write_bytes((checkpoint[0] / name).read_bytes())
    return tmp_path


def write(folder, tensors, name=WHOLE):
    save_file(tensors, folder / name, {"format": "pt"})


def write_shards(folder, tensors):
    (folder / WHOLE).unlink()
    weight_map = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in {*weight_map.values()}:
        write(folder, {name: tensors[name] for name in tensors if weight_map[name] == file}, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def write_in(dtype):
    return lambda folder, tensors: write(folder, {name: tensor.astype(dtype) for name, tensor in tensors.items()})


def write_more(more):
    return lambda folder, tensors: write(folder, tensors | more(tensors))


def set_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")


def write_others(*names):
    def others(folder, tensors):
        for name in names:
            write(folder, {name: 1 + tensor for name, tensor in tensors.items()}, name)

    return others


def write_shards_and_others(folder, tensors):
    write_shards(folder, tensors)
    write_others("model-00001-of-00003.safetensors", "model.fp16.safetensors")(folder, tensors)


MASKS = {
    "transformer.h.0.attn.bias": np.tril(np.ones((1, 1, 16, 16), np.uint8)),
    "transformer.h.0.attn.masked_bias": np.full((), -1e4, np.float32),
}
FORMS = {
    "float16": write_in("float16"),
    "bfloat16": write_in("bfloat16"),
    "float64": write_in("float64"),
    "no prefix": lambda folder, tensors: write(
        folder, {name[len("transformer.") :]: tensors[name] for name in tensors}
    ),
    "causal masks": write_more(lambda _: MASKS),
    "the tied head": write_more(lambda tensors: {"lm_head.weight": tensors[EMBEDDING].copy()}),
    "gelu_pytorch_tanh": lambda folder, _: set_config(folder, activation_function="gelu_pytorch_tanh"),
    "other weights in the folder": write_others(
        "model.fp16.safetensors", "model_ema.safetensors", "model-00001-of-00002.safetensors"
    ),
    "shards": write_shards,
    "shards and others that the index does not list": write_shards_and_others,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_tensors_are_those_that_transformers_reads(form, checkpoint, folder):
    form(folder, load_file(folder / WHOLE))
    config, params = weight_loader.load(folder)
    assert config == CONFIG
    tokens = np.random.default_rng(0).integers(50, size=(2, 16))
    expected = reference.logits_of(reference.load(folder), tokens)
    np.testing.assert_allclose(expected, reference.logits_of(checkpoint[1], tokens), atol=0.1)  # it found them too
    np.testing.assert_allclose(reference.forward(config, params, tokens), expected, atol=1e-5)


SIZES = {
    "1 position": {"positions": 1},
    "2 positions": {"positions": 2},
    "17 positions": {"positions": 17},
    "a vocabulary of 1": {"vocab": 1},
    "a vocabulary of 2": {"vocab": 2},
    "a vocabulary of 3": {"vocab": 3},
    "1 head": {"heads": 1},
    "heads of size 1": {"heads": 16},
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_model_of_any_size_continues_prompts_up_to_and_past_its_context(sizes, tmp_path):
    model = reference.random_checkpoint(tmp_path, **sizes)
    config, params = weight_loader.load(tmp_path)
    assert [config.block_size, config.vocab_size] == [model.config.n_positions, model.config.vocab_size]
    for length in 1, config.block_size, config.block_size + 1:
        text = np.random.default_rng(length).integers(config.vocab_size, size=length).tolist()
        for tokens, rows in generate(config, params, text, 3, sampling=Sampling(temperature=0)):
            for token, row in zip(tokens[0].tolist(), rows[0], strict=True):
                expected = reference.logits_of(model, [text[-config.block_size :]])[0, -1]
                np.testing.assert_allclose(row, expected, atol=1e-4)
                assert token == row.argmax()
                text = [*text, token]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "relu"}, "activation_function must be 'gelu_new' or 'gelu_pytorch_tanh', got 'relu'"),
        ({"model_type": "llama"}, "model_type must be 'gpt2', got 'llama'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon must be 1e-05, got 1e-06"),
        ({"scale_attn_weights": False}, "scale_attn_weights must be True, got False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False, got True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True, got False"),
        ({"add_cross_attention": True}, "add_cross_attention must be False, got True"),
        ({"n_inner": 7}, "n_inner must be 4 * n_embd (64), got 7"),
        ({"n_head": 0}, "n_head must be a whole number from 1 to 16777216, got 0"),
        ({"n_head": 3}, "n_embd must be a multiple of n_head (3), got 16"),
        ({"n_layer": "4"}, "n_layer must be a whole number from 1 to 1000, got '4'"),
        ({"n_layer": True}, "n_layer must be a whole number from 1 to 1000, got True"),
        ({"n_layer": 1001}, "n_layer must be a whole number from 1 to 1000, got 1001"),
        ({"n_embd": None}, "n_embd must be a whole number from 1 to 16777216, got None"),
    ],
)
def test_a_config_of_another_model_is_refused(change, message, folder):
    set_config(folder, **change)
    with pytest.raises(ValueError) as caught:
        weight_loader.load(folder)
    assert str(caught.value) == f"{folder / 'config.json'}: {message}"


def test_the_number_of_positions_is_n_positions_else_n_ctx_else_1024(folder):
    for config, positions in ({"n_ctx": 7, "n_positions": 9}, 9), ({"n_ctx": 7}, 7), ({}, 1024):
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert weight_loader.read_config(folder) == GPTConfig(block_size=positions)  # and the rest is GPT-2's


TENSORS = {
    "another head": (
        lambda t: t | {"lm_head.weight": t[EMBEDDING] * np.float32(1.001)},
        ": lm_head.weight must equal wte.weight, as tie_word_embeddings says",
    ),
    "NaN": (lambda t: t | {"transformer.ln_f.bias": t["transformer.ln_f.bias"] * np.nan}, "holds NaN or infinity"),
    "infinity": (lambda t: t | {"transformer.ln_f.bias": t["transformer.ln_f.bias"] / 0}, "holds NaN or infinity"),
    "integers": (
        lambda t: t | {"transformer.ln_f.bias": np.ones(16, np.int64)},
        f"/{WHOLE}: transformer.ln_f.bias must be floating-point, got int64",
    ),
    "a shape": (
        lambda t: t | {"transformer.wpe.weight": t["transformer.wpe.weight"][1:]},
        f"/{WHOLE}: transformer.wpe.weight must have shape (16, 16), got (15, 16)",
    ),
    "a transposed matrix": (
        lambda t: t | {"transformer.h.0.mlp.c_fc.weight": t["transformer.h.0.mlp.c_proj.weight"]},
        f"/{WHOLE}: transformer.h.0.mlp.c_fc.weight must have shape (16, 64), got (64, 16)",
    ),
    "the shape of the head": (
        lambda t: t | {"lm_head.weight": t[EMBEDDING][1:]},
        f"/{WHOLE}: lm_head.weight must have shape (50, 16), got (49, 16)",
    ),
    "a layer more": (
        lambda t: t | {"transformer.h.1.ln_1.bias": t["transformer.h.0.ln_1.bias"]},
        f"/{WHOLE}: transformer.h.1.ln_1.bias is not a tensor of this GPT-2",
    ),
    "an adapter": (
        lambda t: t | {"h.0.attn.c_attn.lora_A.weight": np.ones((4, 16), np.float32)},
        f"/{WHOLE}: h.0.attn.c_attn.lora_A.weight is not a tensor of this GPT-2",
    ),
    "one twice": (lambda t: t | {"ln_f.bias": t["transformer.ln_f.bias"]}, "ln_f.bias is given twice"),
    "one missing": (
        lambda t: {name: t[name] for name in t if name != "transformer.h.0.mlp.c_fc.bias"},
        " lacks 1 tensors: h.0.mlp.c_fc.bias",
    ),
    "three missing": (
        lambda t: {name: t[name] for name in t if not re.search(r"wte|wpe|ln_f.bias", name)},
        " lacks 3 tensors: wte.weight, wpe.weight, ln_f.bias",
    ),
    "all but one missing": (
        lambda t: {"wte.weight": t[EMBEDDING]},
        " lacks 15 tensors: wpe.weight, h.0.ln_1.weight, h.0.ln_1.bias, ...",
    ),
}


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS)
def test_tensors_of_another_model_are_refused(change, message, folder):
    write(folder, change(load_file(folder / WHOLE)))
    with pytest.raises(ValueError) as caught:
        weight_loader.load(folder)
    assert str(caught.value).startswith(str(folder)) and str(caught.value).endswith(message)


def test_a_tensor_that_two_shards_hold_is_refused(folder):
    tensors = load_file(folder / WHOLE)
    write_shards(folder, {name.removeprefix("transformer."): tensors[name] for name in tensors})
    write(folder, {"transformer.ln_f.bias": tensors["transformer.ln_f.bias"]}, "more.safetensors")
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index["weight_map"]["transformer.ln_f.bias"] = "more.safetensors"
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match=r"more.safetensors: transformer.ln_f.bias is given twice"):
        weight_loader.load(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", " cannot be read: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[" * 10**5, " cannot be read: "),
        ("[]", " must hold a JSON object, got list"),
        ("{}", ": weight_map must map tensor names to files"),
        ('{"weight_map": {}}', ": weight_map must map tensor names to files"),
        ('{"weight_map": ["a"]}', ": weight_map must map tensor names to files"),
        ('{"weight_map": {"a": 1, "b": "c"}}', ": weight_map must map tensor names to files"),
        ('{"weight_map": {"a": "gone.safetensors"}}', ": 'gone.safetensors' must be a file in the same folder"),
        ('{"weight_map": {"a": ".."}}', ": '..' must be a file in the same folder"),
        ('{"weight_map": {"a": "../other.safetensors"}}', ": '../other.safetensors' must be a file in the same folder"),
    ],
)
def test_an_index_that_does_not_list_files_is_refused(index, message, folder):
    inner = folder / "inner"
    inner.mkdir()
    for source, target in ("config.json", inner / "config.json"), (WHOLE, folder / "other.safetensors"):
        (folder / source).rename(target)
    (inner / INDEX).write_text(index, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        weight_loader.load(inner)
    assert str(caught.value).startswith(f"{inner / INDEX}{message}")


def test_weights_in_another_format_or_damaged_are_refused_in_one_line(folder):
    whole = (folder / WHOLE).read_bytes()
    (folder / WHOLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError) as caught:
        weight_loader.load(folder)
    assert str(caught.value) == f"{folder} must hold {WHOLE} or {INDEX}: weights are read from no other format"
    for damaged in (b"", whole[:100], whole[:-100]):
        (folder / WHOLE).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{WHOLE} cannot be read as safetensors: ") as caught:
            weight_loader.load(folder)
        assert "\n" not in str(caught.value)


def test_float8_is_refused_in_one_line(folder):
    header = b'{"wte.weight": {"dtype": "F8_E4M3", "shape": [50, 16], "data_offsets": [0, 800]}}'
    (folder / WHOLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(800))
    with pytest.raises(ValueError, match=f"{WHOLE} cannot be read as safetensors: .*float8_e4m3fn"):
        weight_loader.load(folder)


@pytest.mark.parametrize("text", ["", "[]", "\udcff"])
def test_a_config_that_is_no_json_object_is_refused(text, folder):
    (folder / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=r"config.json (cannot be read: |must hold a JSON object, got list$)"):
        weight_loader.load(folder)


def test_a_cropped_model_is_the_same_on_short_texts(checkpoint):
    config, params = weight_loader.crop(*weight_loader.load(checkpoint[0]), 5)
    tokens = np.random.default_rng(0).integers(50, size=(2, 5))
    ours = reference.forward(config, params, tokens)
    np.testing.assert_allclose(ours, reference.logits_of(checkpoint[1], tokens), atol=1e-5)
    with pytest.raises(ValueError, match="block_size must be at most this checkpoint's 16, got 17"):
        weight_loader.crop(*weight_loader.load(checkpoint[0]), 17)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_written_loads_in_transformers(dtype, params, tmp_path):
    weight_loader.save(tmp_path, CONFIG, params, dtype=dtype)
    assert {tensor.dtype.name for tensor in load_file(tmp_path / WHOLE).values()} == {dtype}
    assert str(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype) == f"torch.{dtype}"
    tokens = np.arange(16)[None]
    ours = reference.forward(CONFIG, params, tokens)
    tolerance = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}[dtype]
    np.testing.assert_allclose(reference.logits_of(reference.load(tmp_path), tokens), ours, atol=tolerance)


def test_a_model_without_biases_is_written_with_zeros(params, tmp_path):
    config = replace(CONFIG, bias=False)
    without = init_params(config, jax.random.key(0))
    without = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), without)
    weight_loader.save(tmp_path, config, without)
    tokens = np.arange(16)[None]
    expected = reference.logits_of(reference.load(tmp_path), tokens)
    np.testing.assert_allclose(reference.forward(config, without, tokens), expected, atol=1e-5)


def test_saved_and_loaded_again_is_the_same_to_the_bit(params, tmp_path):
    weight_loader.save(tmp_path, CONFIG, params)
    config, again = weight_loader.load(tmp_path)
    assert config == CONFIG
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again))
    assert not list(tmp_path.glob("*.part"))


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
