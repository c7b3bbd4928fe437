"""No test asks a hub; the tiny models are random, with weights large enough for logits that differ."""

import os
import shutil
from functools import partial

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from shared.tokenizer import find_model
from tripy_nanogpt import example
from tripy_nanogpt.engine import load
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
def executables(tmp_path_factory):
    return tmp_path_factory.mktemp("executables")


@pytest.fixture(scope="session", params=["float32", "float16", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="session")
def engine(tiny, executables, dtype):
    return load(tiny, dtype, executables=executables)


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """The folder of a random GPT-2 of width 128, which int4 has a block for, with gpt2-nano's tokenizer."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(1)
    config = GPT2Config(n_positions=32, vocab_size=1408, n_layer=2, n_head=2, n_embd=128, initializer_range=0.1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(find_model("gpt2-nano").folder / name, folder)
    return folder


@pytest.fixture
def main(executables, monkeypatch):
    """example.main, with the executables of these tests."""
    monkeypatch.setattr(example, "load", partial(load, executables=executables))
    return example.main


@pytest.fixture
def refused(capsys):
    """main, flags -> the one line of a run that ends with status 2 and prints nothing else."""

    def run(main, *flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([*map(str, flags)])
        printed = capsys.readouterr()
        assert caught.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
        return printed.err.rstrip("\n")

    return run


@pytest.fixture(scope="session")
def modelopt(wide):
    """mode -> the model as ModelOpt has quantized it: the reference for ours. Its `calibrated` holds the samples."""
    quantized = {}

    def quantize(mode):
        if mode not in quantized:
            model, samples = GPT2LMHeadModel.from_pretrained(wide, dtype=torch.float32).eval(), set()

            def note(model, args, given):
                samples.update(map(tuple, given["input_ids"].tolist()))

            hook = model.register_forward_pre_hook(note, with_kwargs=True)
            quantized[mode] = modelopt_quantize(model, mode)
            quantized[mode].calibrated = samples
            hook.remove()
        return quantized[mode]

    return quantize
