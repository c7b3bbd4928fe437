"""Random models are tiny, no test asks a hub, and each has a folder of its own for its graphs."""

import json
import os
import string
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client

import pytest
import torch
import transformers

from neuron_nanogpt import compiler, run_model, weight_loader
from tests.neuron.standin import StandIn

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
LETTERS = string.ascii_letters + string.digits


def _random_checkpoint(folder, layers=2, heads=2, width=32, vocab=50, positions=16, seed=0):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=vocab, n_positions=positions, n_layer=layers, n_head=heads, n_embd=width, initializer_range=0.3
    )
    reference = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # new biases are 0 and norms 1: a loader that loses them would pass
        for parameter in reference.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    reference.save_pretrained(folder)
    if vocab <= len(LETTERS):
        (folder / "meta.json").write_text(json.dumps({"chars": LETTERS[:vocab]}), encoding="utf-8")
    return reference


@pytest.fixture(scope="session")
def random_checkpoint():
    return _random_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(folder, transformers' model) of a random GPT-2 with 16 positions."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, _random_checkpoint(folder)


@pytest.fixture(scope="session")
def long(tmp_path_factory):
    """The same with 140 positions."""
    folder = tmp_path_factory.mktemp("long")
    return folder, _random_checkpoint(folder, positions=140)


@pytest.fixture
def run(capsys):
    """Calls a script's main: its exit status, stdout and stderr."""

    def call(*flags, script=run_model):
        try:
            status = script.main(flags) or 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def gpt(tiny):
    return weight_loader.load(tiny[0])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        yield


@pytest.fixture
def neuron(monkeypatch, tmp_path):
    """A machine with a NeuronCore, as far as the scripts can see."""
    module, load = StandIn(), torch.jit.load

    def load_to_a_core(file):
        module.loaded()
        return load(file)

    monkeypatch.setattr(torch.jit, "load", load_to_a_core)
    monkeypatch.setitem(sys.modules, "torch_neuronx", module)
    monkeypatch.setattr(compiler, "DRIVER", tmp_path)
    return module
