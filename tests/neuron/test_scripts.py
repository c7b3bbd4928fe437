"""run_model.py, sample.py and bench.py as commands: what they print, what they save, what they refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from neuron_nanogpt import bench, run_model, sample
from shared.tokenizer import find_model, load_tokenizer

PROJECT = Path(run_model.__file__).parent
NANO = "--model=gpt2-nano"
GREEDY = (NANO, "--prompt=ROMEO:", "--temperature=0", "--max-new-tokens=40", "--device=cpu")


def command(*flags, script="run_model.py"):
    return [sys.executable, os.fspath(PROJECT / script), *flags]


def test_the_example_runs_without_arguments():
    result = subprocess.run(command(), capture_output=True, encoding="utf-8", timeout=300)
    assert result.returncode == 0 and result.stderr == ""
    first, *graphs = result.stdout.splitlines()[:3]
    assert first.startswith("gpt2") and " on cpu: TorchScript of torch 2." in first and "torch-neuronx" in first
    assert [line.split()[:2] for line in graphs] == [
        ["gpt2_step_neuron.pt:", "traced"],
        ["gpt2_prefill_128_neuron.pt:", "traced"],
    ]
    assert {path.suffix for path in Path().iterdir()} == {".pt", ".json"}


def test_the_text_is_that_of_the_baseline_in_every_way(run, tmp_path):
    texts = []
    for flags in [], ["--window"], ["--batch=2"], ["--buckets=8"]:
        status, out, err = run(*GREEDY, *flags)
        assert (status, err) == (0, "")
        texts.append(out.split("\n\n", 1)[1].split("-" * 15)[0].split("\n\n40 tokens")[0].rstrip("\n"))
    baseline = run(*GREEDY, script=sample)[1].split("\n\n", 1)[1].rstrip("\n")
    assert set(texts) == {baseline} and baseline.startswith("ROMEO:\n")


def test_the_same_seed_draws_the_same_text(run):
    def text(seed):
        return run(NANO, "--max-new-tokens=20", f"--seed={seed}")[1].split("\n\n", 1)[1].rsplit("\n\n", 1)[0]

    assert text(1) == text(1) != text(2)


def test_the_dump_holds_what_was_printed(run, tmp_path):
    _, out, _ = run(*GREEDY, "--dump=d.npz", "--ignore-eos")
    tokenizer, saved = load_tokenizer(find_model("gpt2-nano").folder), np.load("d.npz")
    assert saved["prompt_ids"].tolist() == tokenizer.encode("ROMEO:")
    assert saved["tokens"].shape == (40,) and saved["logits"].dtype == np.float32
    assert saved["logits"].argmax(axis=1).tolist() == saved["tokens"].tolist()
    assert "ROMEO:" + tokenizer.decode(saved["tokens"].tolist()) in out


def test_end_of_text_ends_a_text_unless_ignored(run, tmp_path):
    """A model that says <|endoftext|> for ever: only its embedding is not zero."""
    source = find_model("gpt2-nano").folder
    eot = load_tokenizer(source).eot
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(source / "model.safetensors").items()}
    for name, tensor in tensors.items():
        if name.endswith("ln_f.bias"):
            tensor += 1
        if name.endswith("wte.weight"):
            tensor[eot] = 1
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    for name in "config.json", "vocab.json", "merges.txt":
        (folder / name).write_bytes((source / name).read_bytes())
    flags = (f"--model={folder}", "--max-new-tokens=5", "--batch=2", "--dump=d.npz")
    for more, count, text in ([], 1, ""), (["--ignore-eos"], 5, "<|endoftext|>" * 5):
        _, out, _ = run(*flags, *more)
        assert f"\n\n\n{text}\n" + "-" * 15 + "\n\n" in out and f"\n{2 * count} tokens in" in out
        assert np.load("d.npz")["tokens"].tolist() == [eot] * count


def test_an_empty_prompt_starts_from_end_of_text(run):
    assert run(NANO, "--prompt=", "--max-new-tokens=1", "--dump=d.npz")[0] == 0
    assert np.load("d.npz")["prompt_ids"].tolist() == [load_tokenizer(find_model("gpt2-nano").folder).eot]


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


def test_a_reader_that_has_seen_enough_is_no_error():
    pipe = " ".join(command(NANO, "--max-new-tokens=30")) + " | head -n 1"
    result = subprocess.run(["bash", "-c", pipe], capture_output=True, encoding="utf-8", timeout=300)
    assert result.stdout.startswith("gpt2-nano") and result.stderr == ""


def test_an_interrupt_is_one_line_and_status_130():
    flags = command(NANO, "--max-new-tokens=100000", "--ignore-eos")
    with subprocess.Popen(flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as process:
        for line in process.stdout:
            if line.startswith("logits differ"):
                break
        process.send_signal(2)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "interrupted\n"


def test_the_bench_ends_with_one_json_document(run, monkeypatch):
    monkeypatch.setattr(bench, "PAIRS", 1)
    status, out, err = run("--model=gpt2-nano", "--new-tokens=4", "--device=cpu", script=bench)
    assert status == 0, err
    document = json.loads(out.splitlines()[-1])
    assert document["project"] == "neuron_nanogpt"
    rows = {row["work"]: row for row in document["results"]}
    assert [*rows] == ["decode", "prefill", "decode_window", "decode_batch8", "decode_bfloat16", "warm_start"]
    assert (
        rows["decode"]["peer"]["name"] == "transformers" and rows["decode"]["ratio"] > 0 and rows["decode"]["mbu"] > 0
    )
    assert rows["decode_bfloat16"]["dtype"] == "bfloat16" and rows["decode_batch8"]["batch"] == 8
    assert run("--new-tokens=1", script=bench)[0] == 2
    status, _, err = run("--model=gpt2-nano", "--new-tokens=241", script=bench)
    assert status == 2 and err == "new_tokens must be at most 240 after a 16-token prompt, got 241\n"
