"""create_forward_loop(...): which texts, how they are cut, and that ModelOpt sees them."""

import json
import sys
from types import SimpleNamespace

import modelopt.torch.quantization as mtq
import pytest
import torch
from transformers import AutoTokenizer

from shared.tokenizer import Characters, find_model, load_tokenizer
from tripy_nanogpt import quantization
from tripy_nanogpt.quantization import create_forward_loop

NANO = find_model("gpt2-nano").folder
TOKENIZER = load_tokenizer(NANO)


class Recorder(torch.nn.Module):
    """A model that records its inputs."""

    def __init__(self, n_positions=32):
        super().__init__()
        self.config = SimpleNamespace(n_positions=n_positions)
        self.linear = torch.nn.Linear(4, 4)
        self.given = []

    def forward(self, input_ids, attention_mask):
        assert not torch.is_grad_enabled()
        self.given.append((input_ids, attention_mask))
        return self.linear(input_ids[..., None].float().expand(*input_ids.shape, 4))


def samples(dataset, tokenizer=TOKENIZER, batch_size=2, num_samples=100, n_positions=32):
    model = Recorder(n_positions)
    loop = create_forward_loop(model, str(dataset), tokenizer, "cpu", batch_size, num_samples)
    loop(model)
    assert all(len(ids) <= batch_size for ids, _ in model.given)
    rows = [row[mask.bool()].tolist() for ids, masks in model.given for row, mask in zip(ids, masks, strict=True)]
    return rows, loop.text, model


def test_a_text_is_cut_into_samples_and_the_last_is_padded_behind_a_mask(tmp_path):
    (tmp_path / "a.txt").write_text("so it is " * 40, encoding="utf-8")
    ids = TOKENIZER.encode("so it is " * 40)
    rows, said, model = samples(tmp_path / "a.txt")
    assert rows == [ids[i : i + 32] for i in range(0, len(ids), 32)]
    assert said == f"{len(rows)} samples of up to 32 tokens from {tmp_path / 'a.txt'}"
    padded, mask = model.given[-1]
    assert padded[mask == 0].tolist() == [TOKENIZER.eot] * int((mask == 0).sum())


def test_a_tokenizer_without_end_of_text_pads_behind_the_mask_too(tmp_path):
    (tmp_path / "a.txt").write_text("abba " * 9, encoding="utf-8")  # 45 characters
    tokenizer = Characters.from_text("ab ")
    rows, _, model = samples(tmp_path / "a.txt", tokenizer)
    assert rows == [tokenizer.encode("abba " * 9)[i : i + 32] for i in (0, 32)]
    assert model.given[0][0].shape == (2, 32) and model.given[0][1].sum() == 45


def test_num_samples_are_taken_from_all_texts_in_turn(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 100, encoding="utf-8")
    (tmp_path / "not.md").write_text("no", encoding="utf-8")
    rows, _, _ = samples(tmp_path, num_samples=3)
    starts = [TOKENIZER.encode(f"{name} " * 100) for name in "ab"]
    assert rows == [starts[0][:32], starts[1][:32], starts[0][32:64]]


def test_jsonl_is_read_line_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two")) + "\n", encoding="utf-8"
    )
    assert samples(tmp_path / "a.jsonl")[0] == [TOKENIZER.encode("one"), TOKENIZER.encode("two")]


def test_transformers_tokenizer_gives_the_same(tmp_path):
    (tmp_path / "a.txt").write_text("To be, or not to be: " * 20, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(NANO)
    assert samples(tmp_path / "a.txt", theirs)[0] == samples(tmp_path / "a.txt")[0]


def test_without_a_network_the_text_is_the_repositorys_and_none_that_is_held_out():
    rows, said, _ = samples("cnn_dailymail")
    assert (
        "from LICENSE and checkpoints/gpt2-nano/README.md (cnn_dailymail is not available: HF_HUB_OFFLINE is set)"
        in said
    )
    text = " ".join(TOKENIZER.decode(row) for row in rows)
    assert "Apache License" in text
    from pydoc_data.topics import topics

    held = json.loads((NANO / "heldout.json").read_text(encoding="utf-8"))["pydoc_data.topics"]["topics"]
    assert not any(topics[name][:200] in text for name in held if name in topics)


def test_with_a_network_the_articles_are_cnn_dailymails(monkeypatch):
    from huggingface_hub import constants

    rows = [{"article": f"article {n}", "highlights": "no"} for n in range(9)]
    asked = []

    class Stream:
        def take(self, count):
            return rows[:count]

    def load_dataset(*args, **settings):
        asked.append((args, settings))
        return Stream()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(quantization, "connection_error", lambda url: "")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    got, said, _ = samples("cnn_dailymail", num_samples=3)
    assert got == [TOKENIZER.encode(f"article {n}") for n in range(3)] and "from CNN / DailyMail" in said
    assert asked == [(("abisee/cnn_dailymail", "3.0.0"), {"split": "train", "streaming": True})]


def test_modelopt_calibrates_on_it(tmp_path):
    (tmp_path / "a.txt").write_text("so it is " * 40, encoding="utf-8")
    model = Recorder()
    loop = create_forward_loop(model, str(tmp_path / "a.txt"), TOKENIZER, "cpu", 2, 4)
    mtq.quantize(model, mtq.INT8_DEFAULT_CFG, forward_loop=loop)
    largest = max(ids.max().item() for ids, _ in model.given)
    assert model.linear.input_quantizer.amax.item() == largest


def test_a_progress_bar_counts_the_batches(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("so it is " * 40, encoding="utf-8")
    samples(tmp_path / "a.txt")
    assert "calibrating" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere", None, "--calibration-data must be cnn_dailymail, a .txt, a .jsonl or a folder, got .*nowhere"),
        ("nowhere.txt", None, "nowhere.txt' cannot be read"),
        ("a.jsonl", '{"words": "x"}', "a.jsonl' cannot be read: KeyError"),
        ("a.jsonl", "{", "a.jsonl' cannot be read"),
        ("a.txt", "", "must hold text, got .*a.txt"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        samples(tmp_path / name)
