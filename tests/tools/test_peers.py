"""The peers of make peers: what they share, and each one on a tiny GPT-2 beside transformers.

A peer runs in its own environment, as make peers runs it; transformers runs here.
"""

import json
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from tests.conventions.rules import ROOT
from tests.tools.peers import gpt2

# and the widths that no CPU lacks instructions for, beside float32
PEERS = {
    "openvino": ["int8", "int4"],
    "onnxruntime": ["int8", "int4"],
    "llama": ["bfloat16", "float16", "int8", "int4"],
    "ctranslate2": ["int8"],
    "transformers": ["bfloat16"],
}
PROMPT, NEW = [5, 90, 17, 33, 2, 61, 44], 20
CONVERT = "import importlib, sys; from pathlib import Path; "
CONVERT += "importlib.import_module(sys.argv[1]).convert(*map(Path, sys.argv[2:]))"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random GPT-2 whose biases and norms are not the initial zeros and ones, and the same in memory."""
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "n_positions": 64, "n_embd": 64, "n_layer": 3, "n_head": 4, "layer_norm_epsilon": 1e-3}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=96, eos_token_id=96)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def expected(tiny):
    """The greedy tokens, and the logits after each of prompt and tokens but the last."""
    _, model = tiny
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(NEW):
            logits = model(torch.tensor([ids])).logits[0]
            ids.append(int(logits[-1].argmax()))
    return ids[len(PROMPT) :], logits.numpy()


def python_of(peer):
    python = ROOT / ".tox" / f"peer-{peer}" / "bin" / "python"
    if peer == "transformers":
        return sys.executable
    if not python.exists():
        pytest.skip(f"needs the environment peer-{peer}, which make peers installs")
    return python


def ask(python, module, folder, dtype, *requests):
    command = [python, "-m", "tests.tools.worker", module, folder, dtype]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    done = subprocess.run(command, cwd=ROOT, input=lines, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module", params=PEERS)
def converted(request, tiny, tmp_path_factory):
    """A peer's name, its Python, and the folder that it loads."""
    python, to = python_of(request.param), tmp_path_factory.mktemp(request.param)
    if request.param == "transformers":
        return request.param, python, tiny[0]
    subprocess.run([python, "-c", CONVERT, f"tests.tools.peers.{request.param}", tiny[0], to], cwd=ROOT, check=True)
    return request.param, python, to


def test_float32_gives_the_tokens_and_likelihoods_of_transformers(converted, tiny, expected):
    (peer, python, folder), (_, model), (tokens, _) = converted, tiny, expected
    generate, score = {"prompt": PROMPT, "new_tokens": NEW}, {"score": PROMPT + tokens}
    first, scored, second = ask(python, f"tests.tools.peers.{peer}", folder, "float32", generate, score, generate)
    assert first["tokens"] == second["tokens"] == tokens
    assert scored["nats"] == pytest.approx(nats(expected), abs=0.01)  # llama.cpp's KV cache is float16
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert first["step_bytes"] == 4 * (parameters - model.transformer.wpe.weight.numel())


def test_fewer_bits_give_nearly_the_same_likelihoods_and_read_less(converted, tiny, expected):
    (peer, python, folder), (_, model), (tokens, _) = converted, tiny, expected
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    for dtype in PEERS[peer]:
        requests = {"score": PROMPT + tokens}, {"prompt": PROMPT, "new_tokens": 1}
        scored, told = ask(python, f"tests.tools.peers.{peer}", folder, dtype, *requests)
        assert scored["nats"] == pytest.approx(nats(expected), rel=0.1 if dtype == "int4" else 0.02), dtype
        assert told["step_bytes"] < 0.75 * size, dtype


def nats(expected):
    tokens, logits = expected
    targets = torch.tensor((PROMPT + tokens)[1:])
    return torch.nn.functional.cross_entropy(torch.tensor(logits), targets, reduction="sum").item()


def test_static_cache_without_compilation_gives_the_same_tokens(tiny, expected, monkeypatch):
    from tests.tools.peers import transformers as peer

    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    monkeypatch.setattr(peer, "SLOTS", 8)
    engine = peer.Engine(tiny[0], "compiled")
    tokens, logits = expected
    for _ in range(2):  # the second time in the cache that the first one used
        assert peer.greedy(engine, PROMPT, NEW) == tokens
    np.testing.assert_allclose(peer.score(engine, (PROMPT + tokens)[:-1]), logits, atol=1e-4)


def test_greedy_feeds_each_token_back_once():
    fed = []

    def step(ids):
        fed.append(list(ids))
        return np.eye(9)[ids[-1] + 1]

    engine = types.SimpleNamespace(reset=lambda slots: fed.append(slots), step=step)
    assert gpt2.greedy(engine, [4, 2], 3) == [3, 4, 5]
    assert fed == [5, [4, 2], [3], [4]]


def test_weights_are_read_by_plain_names_as_float32(tmp_path):
    half, single = np.full((2, 3), 0.5, np.float16), np.ones(3, np.float32)
    names = {"h.0.attn.c_attn.weight": half, "h.0.attn.c_attn.bias": single, "wte.weight": half}
    unused = {"transformer.h.0.attn.bias": half, "transformer.h.0.attn.masked_bias": single, "lm_head.weight": half}
    save_file({f"transformer.{name}": array for name, array in names.items()} | unused, tmp_path / "model.safetensors")
    weights = gpt2.read_weights(tmp_path)
    assert weights.keys() == names.keys()
    assert all(array.dtype == np.float32 and (array == names[name]).all() for name, array in weights.items())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_weight_is_off_by_half_a_step_at_most(bits):
    weight = np.random.default_rng(0).standard_normal((5, 64), np.float32)
    weight[1, :32] = 0  # a block without a scale
    codes, scales = gpt2.quantize(weight, bits, 32)
    assert codes.shape == (5, 2, 32) and scales.shape == (5, 2, 1)
    assert codes.min() == -(2 ** (bits - 1)) and codes.max() <= 2 ** (bits - 1) - 1
    apart = np.abs(codes * scales - weight.reshape(5, 2, 32))
    at_the_end = codes == 2 ** (bits - 1) - 1  # of the other sign than the largest one: one step is missing there
    assert (apart <= np.abs(scales) * np.where(at_the_end, 1, 0.5001)).all()


def test_packed_codes_have_the_first_in_the_low_half():
    assert gpt2.pack(np.array([1, -8, -1, 7], np.int8)).tolist() == [0x81, 0x7F]
