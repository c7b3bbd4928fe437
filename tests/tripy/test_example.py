"""example.py and bench.py as commands: what they print, what they save, what they refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from shared.tokenizer import find_model, load_tokenizer
from tripy_nanogpt import bench, example, tripy_cpu

PROJECT = Path(example.__file__).parent
NANO = find_model("gpt2-nano").folder
pytestmark = pytest.mark.skipif(not tripy_cpu.ENGINE, reason="TensorRT is here: what is printed names the CPU")


def run(*flags, cwd=PROJECT, **environment):
    command = [sys.executable, os.path.relpath(PROJECT / "example.py", cwd), *map(str, flags)]
    environment = os.environ | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8", timeout=300)


def test_the_documented_command_is_the_same_with_the_same_seed():
    flags = ("--model-type=gpt2-nano", "--input-text=ROMEO:", "--max-new-tokens=30")
    first, again, other = (run(*flags, f"--seed={seed}") for seed in (1, 1, 2))
    assert first.returncode == 0 and first.stderr == ""
    line, text = first.stdout.split("\n", 1)
    assert line == f"gpt2-nano (3.6M parameters, float16) on cpu: {tripy_cpu.ENGINE}"
    assert text.startswith("ROMEO:") and first.stdout == again.stdout != other.stdout


def test_without_arguments_from_the_root_it_runs_the_default_model():
    result = run(cwd=PROJECT.parent)
    assert result.returncode == 0, result.stderr
    first, text = result.stdout.split("\n", 1)
    assert first.startswith("gpt2") and "on cpu: nvtripy" in first
    if first.startswith("gpt2-nano"):
        assert first.endswith("gpt2 is not in the local cache and HF_HUB_OFFLINE is set")
    assert text.startswith("What is the answer to life, the universe, and everything?")


def test_it_runs_with_the_root_on_pythonpath(tmp_path):
    flags = ("--model=gpt2-nano", "--max-new-tokens=2")
    assert run(*flags, cwd=tmp_path, PYTHONPATH=str(PROJECT.parent)).returncode == 0


@pytest.mark.parametrize("more", [[], ["--no-cache"]])
def test_greedy_text_and_its_dump_are_transformers_own(tmp_path, more):
    dump = tmp_path / "d.npz"
    flags = (
        "--model=gpt2-nano",
        "--input-text=To be, or not",
        "--temperature=0",
        "--max-new-tokens=12",
        "--ignore-eos",
    )
    result = run(*flags, "--max-new-tokens=12", "--dtype=float32", f"--dump={dump}", *more)
    assert result.returncode == 0, result.stderr
    tokenizer, saved = load_tokenizer(NANO), np.load(dump)
    prompt = tokenizer.encode("To be, or not")
    assert saved["prompt_ids"].tolist() == prompt and saved["logits"].dtype == np.float32
    reference = GPT2LMHeadModel.from_pretrained(NANO, dtype=torch.float32)
    exact = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert saved["tokens"].tolist() == exact[0, len(prompt) :].tolist()
    with torch.no_grad():
        logits = reference(exact[:, :-1]).logits[0, len(prompt) - 1 :].numpy()
    np.testing.assert_allclose(saved["logits"], logits, atol=1e-4)
    assert result.stdout.split("\n", 1)[1] == tokenizer.decode(exact[0].tolist()) + "\n"
    assert list(tmp_path.iterdir()) == [dump]


def test_the_text_ends_with_the_context_and_says_so(tmp_path):
    flags = ("--model=gpt2-nano", "--max-new-tokens=300", "--ignore-eos", f"--dump={tmp_path / 'd.npz'}", "--seed=1")
    result = run(*flags, "--input-text=" + "so " * 120)
    assert result.returncode == 0 and result.stdout.endswith("\n[the context of 256 tokens is full]\n")
    saved = np.load(tmp_path / "d.npz")
    assert len(saved["prompt_ids"]) + len(saved["tokens"]) == 257  # the last one is said, and not read again


def test_an_empty_prompt_starts_from_end_of_text(tmp_path):
    flags = ("--model=gpt2-nano", "--input-text=", "--max-new-tokens=3", f"--dump={tmp_path / 'd.npz'}")
    assert run(*flags).returncode == 0
    assert np.load(tmp_path / "d.npz")["prompt_ids"].tolist() == [load_tokenizer(NANO).eot]


def test_end_of_text_ends_the_text_unless_ignored(tmp_path):
    """A model that says <|endoftext|> for ever: only its embedding is not zero."""
    folder = shutil.copytree(NANO, tmp_path / "model")
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["transformer.ln_f.bias"] += 1
    tensors["transformer.wte.weight"][load_tokenizer(NANO).eot] = 1
    save_file(tensors, folder / "model.safetensors")
    flags = (f"--model={folder}", "--input-text=x", "--max-new-tokens=4")
    for more, text in ([], "x\n"), (["--ignore-eos"], "x" + "<|endoftext|>" * 4 + "\n"):
        assert run(*flags, *more).stdout.split("\n", 1)[1] == text


def test_verify_measures_all_three_functions_against_transformers():
    result = run("--model=gpt2-nano", "--verify", "--input-text=To be, or not to be")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(": as expected (up to ") == 2


def test_verify_says_what_is_not_as_expected(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["example.py", "--model=gpt2-nano", "--verify", "--input-text=To be, or not to be"]
    )
    monkeypatch.setitem(example.LIMITS, "float16", 1e-9)
    with pytest.raises(SystemExit) as caught:
        example.main()
    assert caught.value.code == 1 and capsys.readouterr().out.count("NOT as expected") == 2


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--temperature=-1"], "temperature must be a number of at least 0"),
        (["--top-k=0"], "top_k must be a whole number of at least 1"),
        (["--top-p=2"], "top_p must be above 0 and at most 1"),
        (["--seed=-1"], "seed must be a whole number of at least 0"),
        (["--max-new-tokens=0"], "--max-new-tokens is 0, 1 or more is expected"),
        (["--max-new-tokens=x"], "--max-new-tokens: invalid int value: 'x'"),
        (["--model=nowhere"], "'nowhere'"),
        (["--model-type=gpt2-xl"], "gpt2-xl is not in the local cache"),
        (["--dtype=int8"], "--dtype"),
        (["--device=gpu"], "--device is gpu, but nvtripy has no TensorRT here"),
        (["--device=tpu"], "--device is tpu, one of auto, cpu, gpu is expected"),
        (["--input-text=" + "so " * 300], "--input-text is 301 tokens long, at most 256 fit into gpt2-nano's context"),
        (["--dump=nowhere/d.npz"], "--dump is nowhere/d.npz, a file in a folder that exists is expected"),
        (["--dump=/tmp"], "--dump is /tmp, a file in a folder that exists is expected"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, complaint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["example.py", "--model=gpt2-nano", *flags])
    with pytest.raises(SystemExit) as caught:
        example.main()
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == ""
    assert complaint in printed.err and printed.err.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} example.py --model=gpt2-nano --max-new-tokens=200 --ignore-eos | head -n 1"
    result = subprocess.run(["bash", "-c", command], cwd=PROJECT, capture_output=True, encoding="utf-8", timeout=300)
    assert result.stdout.startswith("gpt2-nano") and result.stderr == ""


def test_an_interrupt_ends_in_one_line(tmp_path):
    command = [sys.executable, "example.py", "--model=gpt2-nano", "--ignore-eos", "--max-new-tokens=250", "--no-cache"]
    process = subprocess.Popen(
        command,
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == "interrupted\n"


def test_bench_prints_one_json_document_last(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--model=gpt2-nano", "--new-tokens=8"])
    monkeypatch.setattr(bench, "PAIRS", 1)
    bench.main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["project"] == "tripy_nanogpt"
    rows = {row["work"]: row for row in document["results"]}
    assert rows.keys() >= {"first_token_cold", "first_token_warm", "prefill", "decode", "decode_no_cache"}
    for work in "prefill", "decode", "decode_no_cache":
        row = rows[work]
        assert row["tokens_per_s"] > 0 and row["peer"]["tokens_per_s"] > 0 and row["ratio"] > 0
        assert (row["device"], row["dtype"], row["batch"]) == ("cpu", "float32", 1) and "nvtripy" in row["engine"]
        assert row["peak_rss_mb"] > 100
    assert 0 < rows["decode"]["mbu"] < 2 and rows["prefill"]["ttft_ms"] > 0
    assert rows["first_token_cold"]["ttft_ms"] > 0 and rows["first_token_warm"]["ttft_ms"] > 0


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--new-tokens=1"], "--new-tokens is 1, 2 or more is expected"),
        (["--new-tokens=250"], "--new-tokens is 250, at most 240 fit behind 16 tokens"),
        (["--model=nowhere"], "'nowhere'"),
        (["--random=gpt5"], "--random"),
        (["--device=gpu"], "--device is gpu"),
    ],
)
def test_a_mistake_to_bench_is_one_line_and_status_2(flags, complaint, monkeypatch, capsys):
    more = [] if flags[0].startswith(("--random", "--model")) else ["--model=gpt2-nano"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *more, *flags])
    with pytest.raises(SystemExit) as caught:
        bench.main()
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == ""
    assert complaint in printed.err and printed.err.count("\n") == 1
