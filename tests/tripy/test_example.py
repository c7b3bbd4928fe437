"""example.py: what it prints, what it saves, what it refuses. Two processes of its own; the rest calls main()."""

import json
import shutil
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from shared.tokenizer import find_model, load_tokenizer
from tripy_nanogpt import engine, example, tripy_cpu

PROJECT = Path(example.__file__).parent
NANO = find_model("gpt2-nano").folder
POSITIONS, EOT = 32, load_tokenizer(NANO).eot
pytestmark = pytest.mark.skipif(not tripy_cpu.ENGINE, reason="TensorRT is here: what is printed names the CPU")


@pytest.fixture
def run(executables, monkeypatch, capsys, tmp_path):
    """flags -> (the first line, the text after it, what was saved)"""
    monkeypatch.setattr(engine, "load_engine", partial(engine.load_engine, folder=executables))

    def run(*flags):
        capsys.readouterr()  # transformers' own progress
        example.main([*map(str, flags), f"--dump={tmp_path / 'd.npz'}"])
        printed = capsys.readouterr()
        assert printed.err == ""
        first, text = printed.out.split("\n", 1)
        return first, text, dict(np.load(tmp_path / "d.npz"))

    return run


@pytest.fixture
def refuse(capsys):
    """flags -> the line that it ends with, in status 2"""

    def refuse(*flags):
        with pytest.raises(SystemExit) as caught:
            example.main([*map(str, flags)])
        printed = capsys.readouterr()
        assert caught.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
        return printed.err.rstrip("\n")

    return refuse


def prompt_of(length):
    """A text of so many tokens."""
    text = "so" + " so" * (length - 1)
    assert len(load_tokenizer(NANO).encode(text)) == length
    return f"--input-text={text}"


# -- as a command


def test_in_its_folder_it_prints_the_model_the_device_and_the_text_to_a_reader_that_may_stop():
    command = f"{sys.executable} example.py --model-type=gpt2-nano --max-new-tokens=200 --ignore-eos | head -n 1"
    result = subprocess.run(["bash", "-c", command], cwd=PROJECT, capture_output=True, encoding="utf-8", timeout=300)
    assert result.stdout == f"gpt2-nano (3.6M parameters, float16) on cpu: {tripy_cpu.ENGINE}\n"
    assert result.stderr == ""


def test_without_arguments_from_the_root_it_runs_the_default_model():
    command = [sys.executable, "tripy_nanogpt/example.py"]
    result = subprocess.run(command, cwd=PROJECT.parent, capture_output=True, encoding="utf-8", timeout=300)
    assert result.returncode == 0, result.stderr
    first, text = result.stdout.split("\n", 1)
    assert first.startswith("gpt2") and "on cpu: nvtripy" in first
    if first.startswith("gpt2-nano"):
        assert first.endswith("gpt2 is not in the local cache and HF_HUB_OFFLINE is set")
    assert text.startswith("What is the answer to life, the universe, and everything?")


# -- the text


def test_the_same_seed_gives_the_same_text_and_another_seed_another(run):
    first, again, other = (run("--model=gpt2-nano", "--input-text=ROMEO:", f"--seed={seed}")[1] for seed in (1, 1, 2))
    assert first.startswith("ROMEO:") and first == again != other


@pytest.mark.parametrize("flag", ["--top-k=1", "--top-p=1e-9", "--temperature=0"])
def test_each_way_to_be_greedy_is_greedy_with_any_seed(run, wide, flag):
    texts = {run(f"--model={wide}", "--input-text=To be", "--max-new-tokens=8", flag, f"--seed={n}")[1] for n in (1, 2)}
    assert texts == {run(f"--model={wide}", "--input-text=To be", "--max-new-tokens=8", "--temperature=0")[1]}


@pytest.mark.parametrize("more", [[], ["--no-cache"]])
def test_greedy_text_and_its_dump_are_transformers_own(run, tmp_path, monkeypatch, more):
    monkeypatch.setattr(engine.Engine, "prefill" if more else "forward", None)
    text = "To be, or not"
    flags = "--temperature=0", "--max-new-tokens=12", "--ignore-eos", "--dtype=float32"
    _, written, saved = run("--model=gpt2-nano", f"--input-text={text}", *flags, *more)
    tokenizer, reference = load_tokenizer(NANO), GPT2LMHeadModel.from_pretrained(NANO, dtype=torch.float32)
    prompt = tokenizer.encode(text)
    exact = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        logits = reference(exact[:, :-1]).logits[0, len(prompt) - 1 :].numpy()
    assert saved["prompt_ids"].tolist() == prompt and saved["tokens"].tolist() == exact[0, len(prompt) :].tolist()
    assert saved["logits"].dtype == np.float32
    np.testing.assert_allclose(saved["logits"], logits, atol=1e-4)
    assert written == tokenizer.decode(exact[0].tolist()) + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["d.npz"]


@pytest.mark.parametrize("length", [POSITIONS - 2, POSITIONS])
@pytest.mark.parametrize("more", [[], ["--no-cache"]])
def test_the_text_ends_with_the_context_and_says_so(run, wide, length, more):
    """The last position predicts one more token, which is not read again."""
    model = GPT2LMHeadModel.from_pretrained(wide, dtype=torch.float32)
    flags = "--max-new-tokens=9", "--ignore-eos", "--temperature=0", "--dtype=float32"
    _, text, saved = run(f"--model={wide}", prompt_of(length), *flags, *more)
    assert text.endswith(f"\n[the context of {POSITIONS} tokens is full]\n")
    ids = [*saved["prompt_ids"], *saved["tokens"]]
    assert len(saved["prompt_ids"]) == length and len(ids) == POSITIONS + 1
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0, length - 1 :]
    assert logits.argmax(-1).tolist() == saved["tokens"].tolist()


def test_a_text_that_is_as_long_as_asked_says_nothing_of_the_context(run, wide):
    assert "context" not in run(f"--model={wide}", prompt_of(POSITIONS), "--max-new-tokens=1", "--ignore-eos")[1]


def test_a_longer_prompt_is_refused(refuse, wide):
    line = f"--input-text is {POSITIONS + 1} tokens long, at most {POSITIONS} fit into {wide}'s context"
    assert refuse(f"--model={wide}", prompt_of(POSITIONS + 1)) == line


def test_an_empty_prompt_starts_from_end_of_text(run, wide):
    assert run(f"--model={wide}", "--input-text=", "--max-new-tokens=2")[2]["prompt_ids"].tolist() == [EOT]


def test_end_of_text_ends_the_text_unless_ignored(run, wide, tmp_path):
    """A model that says <|endoftext|> for ever: only its embedding is not zero."""
    folder = shutil.copytree(wide, tmp_path / "model")
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["transformer.ln_f.bias"] += 1
    tensors["transformer.wte.weight"][EOT] = 1
    save_file(tensors, folder / "model.safetensors")
    flags = (f"--model={folder}", "--input-text=x", "--max-new-tokens=4")
    for more, text, count in ([], "x\n", 1), (["--ignore-eos"], "x" + "<|endoftext|>" * 4 + "\n", 4):
        _, written, saved = run(*flags, *more)
        assert written == text and saved["tokens"].tolist() == [EOT] * count


# -- other tokenizers


@pytest.fixture
def characters(tiny, tmp_path):
    """A model of 60 characters, which has no <|endoftext|>."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    meta = {"chars": "".join(map(chr, range(ord("A"), ord("A") + 60)))}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def test_a_character_model_writes_characters(run, characters):
    _, text, saved = run(f"--model={characters}", "--input-text=ABC", "--max-new-tokens=5", "--seed=1")
    assert saved["prompt_ids"].tolist() == [0, 1, 2]
    assert text == "ABC" + "".join(chr(ord("A") + id) for id in saved["tokens"]) + "\n"


def test_an_empty_prompt_without_end_of_text_is_refused(refuse, characters):
    line = "prompt must not be empty: this model has no <|endoftext|>"
    assert refuse(f"--model={characters}", "--input-text=") == line


@pytest.mark.skipif(not find_spec("whisper"), reason="openai-whisper is not installed, which carries GPT-2's ranks")
def test_gpt2s_vocabulary_needs_no_files(run, tmp_path):
    folder = tmp_path / "model"
    GPT2LMHeadModel(GPT2Config(n_positions=8, n_layer=1, n_head=1, n_embd=4)).save_pretrained(folder)
    saved = run(f"--model={folder}", "--input-text=hello world", "--max-new-tokens=1")[2]
    assert saved["prompt_ids"].tolist() == [31373, 995]


# -- verify


def verify(capsys, executables, monkeypatch, wide):
    """(exit status, the verdicts)"""
    monkeypatch.setattr(engine, "load_engine", partial(engine.load_engine, folder=executables))
    with pytest.raises(SystemExit) as caught:
        example.main([f"--model={wide}", "--verify", "--input-text=To be, or not to be"])
    lines = capsys.readouterr().out.splitlines()[1:]
    return caught.value.code, [line.partition(":")[0] for line in lines if ": as expected (up to 0.01)" in line]


def test_verify_measures_all_three_functions(capsys, executables, monkeypatch, wide):
    assert verify(capsys, executables, monkeypatch, wide) == (0, ["forward", "prefill, decode"])


@pytest.mark.parametrize(
    ("function", "passed"), [("forward", ["prefill, decode"]), ("prefill", ["forward"]), ("decode", ["forward"])]
)
@pytest.mark.parametrize("spoil", [lambda logits: logits + 0.02 * abs(logits).max(), lambda logits: logits * np.nan])
def test_verify_fails_for_each_function(capsys, executables, monkeypatch, wide, function, passed, spoil):
    exact = getattr(engine.Engine, function)

    def spoilt(*args):
        result = exact(*args)
        return spoil(result) if function == "forward" else (spoil(result[0]), result[1])

    monkeypatch.setattr(engine.Engine, function, spoilt)
    assert verify(capsys, executables, monkeypatch, wide) == (1, passed)


# -- mistakes


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
        (["--dump=nowhere/d.npz"], "--dump is nowhere/d.npz, a file in a folder that exists is expected"),
        (["--dump=/tmp"], "--dump is /tmp, a file in a folder that exists is expected"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(refuse, flags, complaint):
    assert complaint in refuse("--model=gpt2-nano", *flags)
