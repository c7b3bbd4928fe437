"""Checkpoints that are not what they say, given to every project: one line, status 2, nothing written or executed."""

import json
import os
import pickle
import shutil

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.contract.parity import NANO
from tests.tools.examples import EXAMPLES


class Payload:
    """What unpickling makes a folder of."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def a_pickle(folder, executed):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(str(executed))))


def a_torch_file(folder, executed):
    (folder / "model.safetensors").unlink()
    torch.save(Payload(str(executed)), folder / "pytorch_model.bin")


def half_a_file(folder, executed):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def an_empty_file(folder, executed):
    (folder / "model.safetensors").write_bytes(b"")


def a_header_of_16_exabytes(folder, executed):
    (folder / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f{}")


def a_config_a_million_deep(folder, executed):
    (folder / "config.json").write_text("[" * 1_000_000, encoding="utf-8")


def a_config_of_huge_numbers(folder, executed):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | {"n_layer": 10**9})
    (folder / "config.json").write_text(text, encoding="utf-8")


HOSTILE = [
    a_pickle,
    a_torch_file,
    half_a_file,
    an_empty_file,
    a_header_of_16_exabytes,
    a_config_a_million_deep,
    a_config_of_huge_numbers,
]


@pytest.mark.parametrize("spoil", HOSTILE, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("project", EXAMPLES)
def test_a_spoilt_checkpoint_is_refused_in_one_line(project, spoil, served, tmp_path):
    folder, executed = tmp_path / "checkpoint", tmp_path / "executed"
    shutil.copytree(NANO, folder)
    spoil(folder, executed)
    answer = served(project).ask(model=folder, prompt="To be", new_tokens=4)
    assert answer.status == 2, answer.stderr
    assert answer.stderr.count("\n") == 1 and str(folder) in answer.stderr and "Traceback" not in answer.stderr
    assert not executed.exists() and answer.dump is None


def tokens_that_the_tokenizer_lacks(folder):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=5000, n_positions=64, n_layer=1, n_head=2, n_embd=32)
    GPT2LMHeadModel(config).save_pretrained(folder)  # the tokenizer has 1,408


@pytest.mark.parametrize("project", EXAMPLES)
def test_tokens_that_the_tokenizer_lacks_are_unknown_characters(project, served, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(NANO, folder)
    tokens_that_the_tokenizer_lacks(folder)
    settings = {"prompt": "To be", "new_tokens": 30, "temperature": 1, "top_k": 5000}
    answer = served(project).ask(model=folder, **settings)
    assert answer.status == 0 and "\ufffd" in answer.stdout, answer.stderr
    assert len(answer.dump["tokens"]) == 30 and answer.dump["tokens"].max() >= 1408
