"""No test asks a hub; the tiny models are random, with weights large enough for logits that differ."""

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from shared.tokenizer import find_model
from tripy_nanogpt.device import choose_device
from tripy_nanogpt.engine import load_engine
from tripy_nanogpt.quantization import modelopt_quantize

SHAPE = {"n_positions": 16, "vocab_size": 60, "n_layer": 2, "n_head": 2, "n_embd": 32}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a random GPT-2."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SHAPE, initializer_range=0.3, eos_token_id=59, bos_token_id=59))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or ".ln_" in name:  # transformers begins with zeros and ones, which hide mistakes
            parameter.data += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reference(tiny):
    """ids -> transformers' float32 logits at each position, (T, V)."""
    model = GPT2LMHeadModel.from_pretrained(tiny, dtype=torch.float32).eval()

    def logits(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy()

    return logits


@pytest.fixture(scope="session")
def executables(tmp_path_factory):
    return tmp_path_factory.mktemp("executables")


@pytest.fixture(scope="session", params=["float32", "float16", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="session")
def engine(tiny, executables, dtype):
    return load_engine(tiny, dtype, choose_device("auto"), folder=executables)


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """The folder of a random GPT-2 of 128 channels, which int4 has a block for, with gpt2-nano's tokenizer."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(1)
    config = GPT2Config(n_positions=32, vocab_size=1408, n_layer=2, n_head=2, n_embd=128, initializer_range=0.1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(find_model("gpt2-nano").folder / name, folder)
    return folder


@pytest.fixture(scope="session")
def fake_quantized(wide):
    """mode -> the model as ModelOpt has quantized it: what it computes is the truth for ours.

    Its attribute `calibrated` has the samples that it was given for that.
    """
    kept = {}

    def quantized(mode):
        if mode not in kept:
            model, samples = GPT2LMHeadModel.from_pretrained(wide, dtype=torch.float32).eval(), set()

            def note(model, args, given):
                samples.update(map(tuple, given["input_ids"].tolist()))

            hook = model.register_forward_pre_hook(note, with_kwargs=True)
            kept[mode] = modelopt_quantize(model, mode)
            kept[mode].calibrated = samples
            hook.remove()
        return kept[mode]

    return quantized
