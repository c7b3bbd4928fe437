"""example.py: what it prints, what it saves, what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from shared.tokenizer import find_model, load_tokenizer
from tripy_nanogpt import example, tripy_cpu
from tripy_nanogpt.engine import Engine

PROJECT = Path(example.__file__).parent
NANO = find_model("gpt2-nano").folder
POSITIONS, EOT = 32, load_tokenizer(NANO).eot
pytestmark = pytest.mark.skipif(not tripy_cpu.ENGINE, reason="TensorRT is here: what is printed names the CPU")


@pytest.fixture
def run(main, capsys, tmp_path):
    """flags -> (the first line, the text after it, what was saved)"""

    def run(*flags):
        capsys.readouterr()  # transformers' own progress
        main([*map(str, flags), f"--dump={tmp_path / 'd.npz'}"])
        printed = capsys.readouterr()
        assert printed.err == ""
        first, text = printed.out.split("\n", 1)
        return first, text, dict(np.load(tmp_path / "d.npz"))

    return run


def prompt_of(length):
    """A text of so many tokens."""
    text = "so" + " so" * (length - 1)
    assert len(load_tokenizer(NANO).encode(text)) == length
    return f"--input-text={text}"


# -- as a command


@pytest.mark.parametrize(("folder", "script"), [(PROJECT, "example.py"), (PROJECT.parent, "tripy_nanogpt/example.py")])
def test_a_command_prints_the_model_the_device_and_the_text(folder, script):
    result = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, encoding="utf-8", timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    first, text = result.stdout.split("\n", 1)
    assert first.startswith("gpt2") and f"on cpu: {tripy_cpu.ENGINE}; " in first
    if first.startswith("gpt2-nano"):
        assert "gpt2-nano (3.6M parameters, float16) on " in first and "HF_HUB_OFFLINE is set" in first
    assert text.startswith("What is the answer to life, the universe, and everything?")


# -- the text


def test_the_same_seed_gives_the_same_text_and_another_seed_another(run):
    first, again, other = (run("--model=gpt2-nano", "--input-text=ROMEO:", f"--seed={seed}")[1] for seed in (1, 1, 2))
    assert first.startswith("ROMEO:") and first == again != other


@pytest.mark.parametrize("flag", ["--top_k=1", "--top-p=1e-9", "--temperature=0"])
def test_each_way_to_be_greedy_is_greedy_with_any_seed(run, wide, flag):
    texts = {run(f"--model={wide}", "--prompt=To be", "--max_new_tokens=8", flag, f"--seed={n}")[1] for n in (1, 2)}
    assert texts == {run(f"--model={wide}", "--prompt=To be", "--max-new-tokens=8", "--temperature=0")[1]}


@pytest.mark.parametrize("more", [[], ["--no-cache"]])
def test_greedy_text_and_its_dump_are_transformers_own(run, tmp_path, monkeypatch, more):
    monkeypatch.setattr(Engine, "prefill" if more else "forward", None)
    flags = "--temperature=0", "--max-new-tokens=12", "--ignore-eos", "--dtype=float32"
    _, written, saved = run("--model=gpt2-nano", "--input-text=To be, or not", *flags, *more)
    tokenizer, reference = load_tokenizer(NANO), GPT2LMHeadModel.from_pretrained(NANO, dtype=torch.float32)
    prompt = tokenizer.encode("To be, or not")
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


def test_a_character_model_writes_characters_and_needs_a_prompt(run, main, refused, tiny, tmp_path):
    """60 characters, and no <|endoftext|>."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    meta = {"chars": "".join(map(chr, range(ord("A"), ord("A") + 60)))}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    _, text, saved = run(f"--model={folder}", "--input-text=ABC", "--max-new-tokens=5", "--seed=1")
    assert saved["prompt_ids"].tolist() == [0, 1, 2]
    assert text == "ABC" + "".join(chr(ord("A") + id) for id in saved["tokens"]) + "\n"
    assert "this model has no <|endoftext|>" in refused(main, f"--model={folder}", "--input-text=")


# -- verify


@pytest.fixture
def verify(main, capsys, wide):
    """-> (exit status, the functions that are as expected)"""

    def verify():
        status = main([f"--model={wide}", "--verify", "--input-text=To be, or not to be"])
        lines = capsys.readouterr().out.splitlines()[1:]
        return status, [line.partition(":")[0] for line in lines if ": as expected (up to 0.01)" in line]

    return verify


def test_verify_measures_all_three_functions(verify):
    assert verify() == (0, ["forward", "prefill, decode"])


@pytest.mark.parametrize("mode", ["int8-weight-only", "int4-weight-only", "float8"])
def test_verify_compares_quantized_logits_with_modelopts(main, wide, capsys, mode):
    status = main([f"--model={wide}", "--verify", "--input-text=To be, or not", f"--quant-mode={mode}"])
    lines = capsys.readouterr().out.splitlines()
    verdicts = [line.partition(" of ")[2] for line in lines[-2:]]
    assert status == 0 and all("ModelOpt's float32, relative to the largest: as expected" in text for text in verdicts)


@pytest.mark.parametrize(
    ("function", "passed"), [("forward", ["prefill, decode"]), ("prefill", ["forward"]), ("decode", ["forward"])]
)
@pytest.mark.parametrize("spoil", [lambda logits: logits + 0.02 * abs(logits).max(), lambda logits: logits * np.nan])
def test_verify_fails_for_each_function(verify, monkeypatch, function, passed, spoil):
    exact = getattr(Engine, function)
    monkeypatch.setattr(Engine, function, lambda *args: spoil(exact(*args)))
    assert verify() == (1, passed)


# -- mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature=-1"], "temperature must be "),
        (["--top-k=0"], "top_k must be "),
        (["--top-p=2"], "top_p must be "),
        (["--seed=-1"], "seed must be "),
        (["--max-new-tokens=0"], "--max-new-tokens must be 1 or more, got 0"),
        (["--max-new-tokens=x"], "--max-new-tokens: invalid int value: 'x'"),
        (["--model=nowhere"], "'nowhere'"),
        (["--model-type=gpt2-xl"], "gpt2-xl is not in the local cache"),
        (["--dtype=int8"], "--dtype"),
        (["--quant-mode=int2"], "--quant-mode must be int8-weight-only, int4-weight-only, int4-awq, float8 or fp8"),
        (["--quant-mode=float8", "--calibration-data=nowhere"], "--calibration-data must be cnn_dailymail, a .txt"),
        (["--quant-mode=float8", "--calibration-data=nowhere.txt"], "--calibration-data 'nowhere.txt' cannot be read"),
        (["--fast"], "--fast must be given with --quant-mode"),
        (
            ["--calibration-data=x.txt"],
            "--calibration-data must be given with --quant-mode int4-awq or float8, got None",
        ),
        (["--calibration-data=x.txt", "--quant-mode=int8-weight-only"], "int4-awq or float8, got int8-weight-only"),
        (["--device=gpu"], "--device must be auto or cpu without TensorRT, got gpu: pip install -r requirements.txt"),
        (["--device=tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--dump=nowhere/d.npz"], "--dump must be a file in an existing folder, got nowhere/d.npz"),
        (["--dump=/tmp"], "--dump must be a file in an existing folder, got /tmp"),
        ([f"--input-text={'so ' * 300}"], "--prompt must be at most 256 tokens long, got "),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(main, refused, flags, message):
    assert message in refused(main, "--model=gpt2-nano", *flags)


@pytest.mark.parametrize("function", ["prefill", "decode"])
def test_a_bug_in_the_model_is_not_taken_for_a_mistake(main, wide, monkeypatch, function):
    def bug(*args):
        raise ValueError("broadcast")

    monkeypatch.setattr(Engine, function, bug)
    with pytest.raises(ValueError, match="broadcast"):
        main([f"--model={wide}"])
