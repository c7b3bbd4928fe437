"""No test asks a hub, and none leaves an artifact in the user's cache."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client

import pytest
import torch
import transformers

torch.set_num_threads(2)


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    os.environ["QEFF_HOME"] = str(folder)  # for the scripts that tests start, too
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A GPT-2 of transformers' making, 3 layers, with biases and norms that are not what they start as."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=96, n_embd=64, n_layer=3, n_head=4, bos_token_id=96, eos_token_id=96
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reference(tiny):
    return transformers.GPT2LMHeadModel.from_pretrained(tiny).eval()
