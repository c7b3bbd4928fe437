"""create_forward_loop(...): which texts, how they are cut, and that ModelOpt sees them."""

import json
import sys
from pydoc_data.topics import topics
from types import SimpleNamespace

import modelopt.torch.quantization as mtq
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoTokenizer

from shared.tokenizer import Characters, find_model, load_tokenizer
from tripy_nanogpt import quantization
from tripy_nanogpt.quantization import create_forward_loop

NANO = find_model("gpt2-nano").folder
TOKENIZER = load_tokenizer(NANO)
LINE = "so it is " * 40


class Recorder(torch.nn.Module):
    """A model that records its inputs."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(n_positions=32)
        self.linear = torch.nn.Linear(4, 4)
        self.given = []

    def forward(self, input_ids, attention_mask):
        assert not torch.is_grad_enabled()
        self.given.append((input_ids, attention_mask))
        return self.linear(input_ids[..., None].float().expand(*input_ids.shape, 4))

    def samples(self):
        pairs = [pair for ids, masks in self.given for pair in zip(ids, masks, strict=True)]
        return [ids[mask.bool()].tolist() for ids, mask in pairs]


@pytest.fixture
def calibrate(tmp_path):
    """Texts by file name, what to read -> (the recorder, what the loop says that it read)"""

    def run(texts, dataset, tokenizer=TOKENIZER, num_samples=100):
        for name, text in texts.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        model, path = Recorder(), dataset if dataset == "cnn_dailymail" else str(tmp_path / dataset)
        loop = create_forward_loop(model, path, tokenizer, "cpu", 2, num_samples)
        loop(model)
        assert all(len(ids) <= 2 for ids, _ in model.given)
        return model, loop.text.replace(f"{tmp_path}/", "")

    return run


def test_a_text_is_cut_into_samples_and_the_last_is_padded_behind_a_mask(calibrate, capsys):
    ids = TOKENIZER.encode(LINE)
    model, source = calibrate({"a.txt": LINE}, "a.txt")
    assert model.samples() == [ids[i : i + 32] for i in range(0, len(ids), 32)]
    assert source == f"{len(model.samples())} samples of up to 32 tokens from a.txt"
    padded, mask = model.given[-1]
    assert padded[mask == 0].tolist() == [TOKENIZER.eot] * int((mask == 0).sum())
    assert "calibrating" in capsys.readouterr().err  # a progress bar


def test_a_tokenizer_without_end_of_text_pads_behind_the_mask_too(calibrate):
    tokenizer = Characters.from_text("ab ")
    model, _ = calibrate({"a.txt": "abba " * 9}, "a.txt", tokenizer)  # 45 characters
    assert model.samples() == [tokenizer.encode("abba " * 9)[i : i + 32] for i in (0, 32)]
    assert model.given[0][0].shape == (2, 32) and model.given[0][1].sum() == 45


def test_transformers_tokenizer_gives_the_same(calibrate):
    ours, theirs = (calibrate({"a.txt": LINE}, "a.txt", t)[0] for t in (TOKENIZER, AutoTokenizer.from_pretrained(NANO)))
    assert ours.samples() == theirs.samples()


def test_num_samples_are_taken_from_all_texts_in_turn(calibrate):
    texts = {"a.txt": "a " * 100, "b.txt": "b " * 100, "not.md": "no"}
    first, second = map(TOKENIZER.encode, (texts["a.txt"], texts["b.txt"]))
    assert calibrate(texts, "", num_samples=3)[0].samples() == [first[:32], second[:32], first[32:64]]


def test_jsonl_is_read_line_by_line(calibrate):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two")) + "\n"
    assert calibrate({"a.jsonl": lines}, "a.jsonl")[0].samples() == [*map(TOKENIZER.encode, ("one", "two"))]


def test_without_a_network_the_text_is_the_projects_own_and_none_that_is_held_out(calibrate):
    model, source = calibrate({}, "cnn_dailymail")
    assert source.endswith("from calibration.txt (cnn_dailymail is not available)")
    text = " ".join(map(TOKENIZER.decode, model.samples()))
    held_out = json.loads((NANO / "heldout.json").read_text(encoding="utf-8"))["pydoc_data.topics"]["topics"]
    assert "Apache License" in text and not any(topics[name][:200] in text for name in held_out if name in topics)


def test_with_a_network_the_articles_are_cnn_dailymails(calibrate, monkeypatch):
    articles, asked = [{"article": f"article {n}", "highlights": "no"} for n in range(9)], []

    def load_dataset(*args, **settings):
        asked.append((args, settings))
        return SimpleNamespace(take=lambda count: articles[:count])

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(quantization, "reachable", lambda url: True)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    model, source = calibrate({}, "cnn_dailymail", num_samples=3)
    assert model.samples() == [TOKENIZER.encode(f"article {n}") for n in range(3)] and "CNN / DailyMail" in source
    assert asked == [(("abisee/cnn_dailymail", "3.0.0"), {"split": "train", "streaming": True})]


def test_modelopt_calibrates_on_it(tmp_path):
    (tmp_path / "a.txt").write_text(LINE, encoding="utf-8")
    model = Recorder()
    loop = create_forward_loop(model, str(tmp_path), TOKENIZER, "cpu", 2, 4)
    mtq.quantize(model, mtq.INT8_DEFAULT_CFG, forward_loop=loop)
    assert model.linear.input_quantizer.amax.item() == max(ids.max().item() for ids, _ in model.given)


@pytest.mark.parametrize(
    ("texts", "dataset", "message"),
    [
        ({}, "nowhere", "--calibration-data must be cnn_dailymail, a .txt, a .jsonl or a folder, got .*nowhere"),
        ({}, "nowhere.txt", "nowhere.txt' cannot be read"),
        ({"a.jsonl": '{"words": "x"}'}, "a.jsonl", "a.jsonl' cannot be read: KeyError"),
        ({"a.jsonl": "{"}, "a.jsonl", "a.jsonl' cannot be read"),
        ({"a.txt": ""}, "a.txt", "must hold text, got .*a.txt"),
    ],
)
def test_what_cannot_be_read_is_named(calibrate, texts, dataset, message):
    with pytest.raises(ValueError, match=message):
        calibrate(texts, dataset)
