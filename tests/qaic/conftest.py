"""No test asks a hub, and none leaves an artifact in the user's cache."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client

import functools

import pytest
import torch
import transformers

from qaic_gpt2.auto_model import QEFFAutoModelForCausalLM
from shared.tokenizer import find_model

torch.set_num_threads(1)  # toy shapes: two threads would wait for each other
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    os.environ["QEFF_HOME"] = str(folder)  # also for the scripts that tests start
    return folder


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """A random GPT-2 that transformers saves, whose biases and norms are not the initial zeros and ones."""

    def make(change=None, **settings):
        torch.manual_seed(0)
        shape = {"vocab_size": 97, "n_positions": 96, "n_embd": 64, "n_layer": 3, "n_head": 4}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape | settings)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += 0.1 * torch.randn_like(parameter)
                if change:
                    change(name, parameter)
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny(make_checkpoint):
    return make_checkpoint(bos_token_id=96, eos_token_id=96)


@pytest.fixture(scope="session")
def reference(tiny):
    return transformers.GPT2LMHeadModel.from_pretrained(tiny).eval()


@pytest.fixture(scope="session")
def nano():
    return find_model("gpt2-nano").folder


@pytest.fixture(scope="session")
def nano_reference(nano):
    return transformers.GPT2LMHeadModel.from_pretrained(nano, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tokenizer(nano):
    return transformers.AutoTokenizer.from_pretrained(nano)


@pytest.fixture(scope="session")
def compiled():
    """A compiled model; the same one for the same settings, so no test may change it."""

    @functools.cache
    def compiled(folder, dtype="float32", **settings):
        model = QEFFAutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model.compile(**settings)
        return model

    return compiled
