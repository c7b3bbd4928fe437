"""run_model.py and sample.py as commands: what they print, what they save, what they refuse."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from neuron_nanogpt import bench, compiler, engine, run_model, sample
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
        ["gpt2_prefill_16_neuron.pt:", "traced"],
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


@pytest.mark.parametrize(("positions", "vocab"), [(1, 50), (2, 3), (17, 1)])
@pytest.mark.parametrize("flags", [[], ["--window"]], ids=str)
def test_prompts_that_fill_the_context_continue_as_in_transformers(
    flags, positions, vocab, run, random_checkpoint, tmp_path
):
    folder = tmp_path / "model"
    reference = random_checkpoint(folder, layers=1, width=8, vocab=vocab, positions=positions)
    for length in positions - 1 or 1, positions, positions + 2:
        prompt = ("abc"[:vocab] * length)[:length]
        more = (f"--prompt={prompt}", "--temperature=0", "--max-new-tokens=3", "--dump=d.npz")
        assert run(f"--model={folder}", *more, *flags)[::2] == (0, "")
        saved = np.load("d.npz")
        assert len(saved["prompt_ids"]) == length and len(saved["tokens"]) == 3
        ids = torch.tensor([[*saved["prompt_ids"], *saved["tokens"]]])
        for end, logits in enumerate(saved["logits"], length):
            expected = reference(ids[:, max(0, end - positions) : end]).logits[0, -1]
            np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


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
    """A model that generates only <|endoftext|>."""
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


def test_each_text_of_a_batch_ends_by_itself(run, tmp_path):
    folder, logits = tmp_path / "model", np.zeros((4, 1408), np.float32)
    write_constant(folder, 4.4)  # a quarter to a third of the probability of 200 tokens
    eot, sampler = load_tokenizer(folder).eot, Sampler(temperature=1, top_k=200, seed=1)
    logits[:, eot] = 4.4
    lengths = (np.array([sampler(logits) for _ in range(60)]) == eot).argmax(axis=0) + 1
    assert len({*lengths}) > 2
    flags = ("--temperature=1", "--seed=1", "--batch=4", "--max-new-tokens=60", "--dump=d.npz")
    assert f"\n{lengths.sum()} tokens in " in run(f"--model={folder}", *flags)[1]
    assert len(np.load("d.npz")["tokens"]) == len(np.load("d.npz")["logits"]) == lengths[0]


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (run_model, ["--temperature=-1"], "temperature must be "),
        (run_model, ["--max-new-tokens=0"], "--max-new-tokens must be 1 or more, got 0"),
        (run_model, ["--max_new_tokens=--"], "-- must not be the value of a flag"),
        (run_model, ["--batch=0"], "--batch must be from 1 to 65536, got 0"),
        (run_model, ["--model=nowhere"], "'nowhere'"),
        (run_model, ["--dtype=int4"], "--dtype"),
        (run_model, ["--device=neuron"], "--device must be auto or cpu, got neuron: torch-neuronx is not installed"),
        (run_model, ["--device=xla"], "--device must be auto or cpu, got xla: torch_xla is not installed"),
        (run_model, ["--target=h100"], "--target"),
        (run_model, ["--cores=0"], "--cores must be 1 or more, got 0"),
        (run_model, ["--cores=2"], "--cores must be 1 with a KV cache, got 2"),
        (run_model, ["--cores=2", "--window", "--batch=3"], "--batch must be a multiple of --cores (2), got 3"),
        (run_model, ["--cores=2", "--window", "--batch=2"], "--cores must not be given with the device cpu, got 2"),
        (run_model, ["--target=trn2"], "--target must not be given with the device cpu, got trn2"),
        (run_model, ["--compiler-args=-O1"], "--compiler-args must not be given with the device cpu, got -O1"),
        (run_model, ["--states=copied"], "--states must not be given with the device cpu, got copied"),
        (run_model, ["--dump-hlo=x"], "--dump-hlo must not be given with the device cpu, got x"),
        (run_model, ["--seq-len=8"], "--seq-len must be given with --window, got 8 without"),
        (run_model, ["--buckets=8", "--window"], "--buckets must be given without --window, got both"),
        (run_model, ["--dump=d.npz", "--verify"], "--dump must be given without --verify, got both"),
        (run_model, ["--window", "--seq-len=257"], "--seq-len must be from 1 to the context (256), got 257"),
        (run_model, ["--buckets=x"], "--buckets: must be whole numbers separated by commas, got 'x'"),
        (run_model, ["--buckets=8,512"], "--buckets must be from 1 to the context (256), got 8,512"),
        (run_model, ["--dump=nowhere/d.npz"], "--dump must be a file in an existing folder, got nowhere/d.npz"),
        (run_model, ["--bogus"], "unrecognized arguments: --bogus"),
        (sample, ["--temperature=-1"], "temperature must be "),
        (sample, ["--dtype=int8"], "--dtype"),
        (sample, ["--max-new-tokens=0"], "--max-new-tokens must be 1 or more, got 0"),
        (sample, ["--device=cuda"], "--device must be auto or cpu, got cuda: PyTorch finds none"),
        (bench, ["--new-tokens=1"], "--new-tokens must be from 2 to 240, got 1"),
        (bench, ["--new-tokens=241"], "--new-tokens must be from 2 to 240, got 241"),
        (bench, ["--rounds=0"], "--rounds must be 1 or more, got 0"),
        (bench, ["--device=tpu"], "--device must be auto, cpu, xla or neuron, got tpu"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(script, flags, message, run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    status, out, err = run(NANO, *flags, script=script)
    assert status == 2 and out == "" and message in err
    assert err.count("\n") == 1 and not list(Path().iterdir())


def test_a_file_whose_sha256_does_not_match_its_json_is_one_line_and_status_2(run):
    Path("gpt2_step_neuron.pt").write_bytes(b"PK")
    status, _, err = run(*GREEDY)
    assert status == 2 and err.count("\n") == 1 and "gpt2_step_neuron.pt needs a readable gpt2_step_neuron.json" in err


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    def shapes_differ(*_):
        raise ValueError("a bug of ours")

    monkeypatch.setattr(engine.Cached, "decode", shapes_differ)
    with pytest.raises(ValueError, match="a bug of ours"):
        run(*GREEDY)
