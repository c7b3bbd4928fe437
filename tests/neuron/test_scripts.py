"""run_model.py and sample.py as commands: what they print, what they save, what they refuse."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from neuron_nanogpt import run_model, sample
from shared.sampling import Sampler
from shared.tokenizer import find_model, load_tokenizer

NANO = "--model=gpt2-nano"
GREEDY = (NANO, "--prompt=ROMEO:", "--temperature=0", "--max-new-tokens=40", "--device=cpu")


def text_of(out):
    """The first text that run_model.py printed."""
    return re.split(r"\n-{15}\n|\n\n\d+ tokens in ", out.split("\n\n", 1)[1])[0].rstrip("\n")


def test_the_example_runs_without_arguments(run):
    status, out, err = run()
    assert (status, err) == (0, "")
    first, *graphs = out.splitlines()[:3]
    assert first.startswith("gpt2") and " on cpu: TorchScript of torch 2." in first and "torch-neuronx" in first
    assert [line.split()[:2] for line in graphs] == [
        ["gpt2_step_neuron.pt:", "traced"],
        ["gpt2_prefill_128_neuron.pt:", "traced"],
    ]
    assert {path.suffix for path in Path().iterdir()} == {".pt", ".json"}


def test_the_text_is_that_of_the_baseline_in_every_way(run):
    texts = []
    for flags in [], ["--window"], ["--batch=2"], ["--buckets=8"]:
        status, out, err = run(*GREEDY, *flags)
        assert (status, err) == (0, "")
        texts.append(text_of(out))
    status, out, err = run(*GREEDY, script=sample)
    baseline = out.split("\n\n", 1)[1].rstrip("\n")
    assert set(texts) == {baseline} and baseline.startswith("ROMEO:\n")


@pytest.mark.parametrize("script", [run_model, sample])
def test_each_sampling_flag_reaches_the_sampler(script, run, tiny):
    def text(*flags):
        status, out, err = run(f"--model={tiny[0]}", "--prompt=abc", "--device=cpu", *flags, script=script)
        assert (status, err) == (0, "")
        return text_of(out) if script is run_model else out.split("\n\n", 1)[1]

    hot = ("--temperature=9", "--max-new-tokens=20")  # past the context
    greedy = text("--temperature=0", "--max-new-tokens=20")
    assert text(*hot, "--seed=1") == text(*hot, "--seed=1")
    assert len({greedy, text(*hot, "--seed=1"), text(*hot, "--seed=2")}) == 3
    assert text(*hot, "--top-p=1e-9") == text(*hot, "--top-k=1") == greedy  # the most likely token alone
    assert len(greedy.strip()) == len("abc") + 20


def test_the_dump_holds_what_was_printed_and_the_logits_of_transformers(run, tiny):
    _, out, _ = run(f"--model={tiny[0]}", "--prompt=abc", "--temperature=0", "--max-new-tokens=12", "--dump=d.npz")
    tokenizer, saved = load_tokenizer(tiny[0]), np.load("d.npz")
    assert saved["prompt_ids"].tolist() == tokenizer.encode("abc")
    assert saved["tokens"].shape == (12,) and saved["logits"].dtype == np.float32
    assert saved["logits"].argmax(axis=1).tolist() == saved["tokens"].tolist()
    assert "abc" + tokenizer.decode(saved["tokens"].tolist()) + "\n" in out
    ids = torch.tensor([[*saved["prompt_ids"], *saved["tokens"]]])
    np.testing.assert_allclose(saved["logits"], tiny[1](ids).logits[0, 2:-1], atol=1e-4, rtol=0)


def test_another_dtype_or_config_is_traced_again(run, tiny, tmp_path):
    """n_head changes the logits and no weight."""
    folder, flags = tmp_path / "model", ("--prompt=abc", "--temperature=0", "--max-new-tokens=5", "--dump=d.npz")
    shutil.copytree(tiny[0], folder)
    run(f"--model={folder}", *flags)
    out = run(f"--model={folder}", *flags, "--dtype=bfloat16")[1]
    assert out.count("for dtype was float32 and is bfloat16") == 2
    run(f"--model={folder}", *flags)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"n_head": 8}), encoding="utf-8")
    status, out, _ = run(f"--model={folder}", *flags)
    assert status == 0 and out.count("for the weights changed") == 2
    reference = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    saved = np.load("d.npz")
    ids = torch.tensor([[*saved["prompt_ids"], *saved["tokens"]]])
    np.testing.assert_allclose(saved["logits"], reference(ids).logits[0, 2:-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("positions", "vocab"), [(1, 50), (2, 50), (17, 50), (4, 1), (4, 2), (4, 3)])
def test_odd_shapes_and_prompts_that_fill_the_context_write_as_transformers(
    positions, vocab, run, random_checkpoint, tmp_path
):
    folder = tmp_path / "model"
    reference = random_checkpoint(folder, layers=1, width=8, vocab=vocab, positions=positions)
    for flags in [], ["--window"]:
        for length in positions - 1 or 1, positions, positions + 2:
            prompt = ("abc"[:vocab] * length)[:length]
            write = (f"--model={folder}", f"--prompt={prompt}", "--temperature=0", "--max-new-tokens=3", "--dump=d.npz")
            status, out, err = run(*write, *flags)
            assert (status, err) == (0, "")
            saved = np.load("d.npz")
            assert len(saved["prompt_ids"]) == length and len(saved["tokens"]) == 3
            ids = torch.tensor([[*saved["prompt_ids"], *saved["tokens"]]])
            for end, logits in enumerate(saved["logits"], length):
                expected = reference(ids[:, max(0, end - positions) : end]).logits[0, -1]
                np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("script", [run_model, sample])
def test_prompts_that_the_model_cannot_start_from_are_refused(script, run, random_checkpoint, tmp_path):
    folder = tmp_path / "model"
    random_checkpoint(folder, vocab=3)
    status, out, err = run(f"--model={folder}", "--prompt=", script=script)
    assert (status, out, err) == (2, "", "prompt must not be empty: this model has no <|endoftext|>\n")
    (folder / "meta.json").write_text('{"chars": "abcde"}', encoding="utf-8")
    status, out, err = run(f"--model={folder}", "--prompt=ad", script=script)
    message = "prompt must have token ids below the model's vocab_size (3), got 3\n"
    assert (status, out, err) == (2, "", message)


def write_constant(folder, logit):
    """A model whose logit of <|endoftext|> is this after any text, and 0 of any other token."""
    source = find_model("gpt2-nano").folder
    folder.mkdir()
    for name in "vocab.json", "merges.txt":
        (folder / name).write_bytes((source / name).read_bytes())
    config = transformers.GPT2Config(vocab_size=1408, n_positions=16, n_layer=1, n_head=1, n_embd=4)
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():
        parameter.zero_()
    model.transformer.ln_f.bias.fill_(1)
    model.transformer.wte.weight[load_tokenizer(folder).eot] = logit / config.n_embd
    model.save_pretrained(folder)


@pytest.fixture
def endless(tmp_path):
    """A model that says <|endoftext|> for ever."""
    write_constant(tmp_path / "model", 400)
    return tmp_path / "model"


def test_end_of_text_ends_a_text_unless_ignored(run, endless):
    eot = load_tokenizer(endless).eot
    flags = (f"--model={endless}", "--max-new-tokens=5")
    for more, count, text in ([], 1, ""), (["--ignore-eos"], 5, "<|endoftext|>" * 5):
        _, out, _ = run(*flags, "--batch=2", "--dump=d.npz", *more)
        assert f"\n\n\n{text}\n" + "-" * 15 + "\n\n" in out and f"\n{2 * count} tokens in" in out
        assert np.load("d.npz")["tokens"].tolist() == [eot] * count
        assert run(*flags, *more, script=sample)[1].endswith(f"\n\n\n{text}\n")


def test_each_text_of_a_batch_has_an_end_of_its_own(run, tmp_path):
    folder, logits = tmp_path / "model", np.zeros((4, 1408), np.float32)
    write_constant(folder, 4.4)  # a quarter to a third of the probability of 200 tokens
    eot, sampler = load_tokenizer(folder).eot, Sampler(temperature=1, top_k=200, seed=1)
    logits[:, eot] = 4.4
    lengths = (np.array([sampler(logits) for _ in range(60)]) == eot).argmax(axis=0) + 1
    assert len({*lengths}) > 2
    _, out, _ = run(f"--model={folder}", "--temperature=1", "--seed=1", "--batch=4", "--max-new-tokens=60")
    assert f"\n{lengths.sum()} tokens in " in out


def test_an_empty_prompt_starts_from_end_of_text(run, endless):
    assert run(f"--model={endless}", "--prompt=", "--max-new-tokens=1", "--dump=d.npz")[0] == 0
    assert np.load("d.npz")["prompt_ids"].tolist() == [load_tokenizer(endless).eot]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--temperature=-1"], "temperature must be a number of at least 0"),
        (["--max-new-tokens=0"], "max_new_tokens must be 1 or more, got 0"),
        (["--batch=0"], "batch must be 1 or more, got 0"),
        (["--model=nowhere"], "'nowhere'"),
        (["--dtype=int8"], "--dtype"),
        (["--device=neuron"], "device is neuron, but torch-neuronx is not installed"),
        (["--target=h100"], "--target"),
        (["--cores=2"], "cores must be 1 with a KV cache, got 2"),
        (["--cores=2", "--window", "--batch=3"], "batch must be a multiple of cores (2), got 3"),
        (["--cores=2", "--window", "--batch=2"], "cores must be 1 on the cpu, got 2"),
        (["--window", "--seq-len=257"], "seq_len must be from 1 to the context (256), got 257"),
        (["--buckets=x"], "buckets must be whole numbers separated by commas, got 'x'"),
        (["--buckets=512"], "buckets must be from 1 to the context (256), got 512"),
        (["--dump=nowhere/d.npz"], "dump must be a file in an existing folder, got nowhere/d.npz"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, complaint, run):
    status, out, err = run(NANO, *flags)
    assert status == 2 and out == "" and complaint in err and err.count("\n") == 1
    assert not list(Path().iterdir())


def test_a_foreign_graph_is_one_line_and_status_2(run):
    Path("gpt2_step_neuron.pt").write_bytes(b"PK")
    status, _, err = run(*GREEDY)
    assert status == 2 and err.count("\n") == 1 and "gpt2_step_neuron.pt has no readable gpt2_step_neuron.json" in err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--top-k=0"], "top_k must be a whole number of at least 1"),
        (["--max-new-tokens=0"], "max_new_tokens must be 1 or more, got 0"),
        (["--device=cuda"], "device is cuda, but PyTorch finds none"),
    ],
)
def test_the_baseline_refuses_in_one_line_too(flags, complaint, run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = run(NANO, *flags, script=sample)
    assert status == 2 and out == "" and complaint in err and err.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_no_error(tiny):
    pipe = f"'{sys.executable}' '{run_model.__file__}' --model={tiny[0]} --prompt=a --max-new-tokens=300 | head -n 1"
    result = subprocess.run(["bash", "-c", pipe], capture_output=True, encoding="utf-8", timeout=300)
    assert result.stdout.startswith(str(tiny[0])) and result.stderr == ""
