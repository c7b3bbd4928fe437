"""No test asks a hub; the tiny models are random, with weights large enough for logits that differ."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tripy_nanogpt.device import choose_device
from tripy_nanogpt.engine import load_engine

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
    return load_engine(tiny, dtype, choose_device("auto"), executables)
