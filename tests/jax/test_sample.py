"""sample.py as a command: what it prints, what it saves, what it refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_nanogpt import sample, weight_loader
from jax_nanogpt.checkpoint import Checkpoints
from jax_nanogpt.model import GPTConfig, init_params
from shared.tokenizer import Characters, find_model, load_tokenizer

PROJECT = Path(weight_loader.__file__).parent
CHARS = "\n !EMORabcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def run(capsys):
    """sample.py in this process: run(flags...) -> what it printed after its first line."""

    def call(*flags):
        assert not sample.main([*map(str, flags), "--device=cpu"])
        call.first, rest = capsys.readouterr().out.split("\n", 1)
        return rest

    return call


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    """What train.py leaves: two checkpoints, the first of them the better one; of a version that had `fast`."""
    folder = tmp_path_factory.mktemp("out")
    Characters(CHARS).save(folder)
    config = GPTConfig(block_size=32, vocab_size=len(CHARS), n_layer=1, n_head=2, n_embd=32, bias=False, dropout=0.5)
    about = {"model": vars(config) | {"fast": True}}
    checkpoints = Checkpoints.start(folder)
    for step, loss in (10, 1.0), (20, 2.0):
        params = init_params(config, jax.random.key(step))
        checkpoints.save(step, params, {"count": np.zeros(1)}, about, loss)
    return folder


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model with gpt2-nano's tokens that says "a", and in one draw of fifty <|endoftext|>."""
    source, folder = find_model("gpt2-nano").folder, tmp_path_factory.mktemp("talker")
    tokenizer = load_tokenizer(source)
    config = GPTConfig(block_size=32, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=8)
    params = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), init_params(config, jax.random.key(0)))
    params["ln_f"]["bias"][0] = 1  # so that the logits are always the embedding's first column
    params["wte"][:, 0] = -1e4
    params["wte"][tokenizer.encode("a"), 0], params["wte"][tokenizer.eot, 0] = np.log(0.98), np.log(0.02)
    weight_loader.save(folder, config, params, source, tokenizer.eot)
    return folder, tokenizer


def test_three_samples_of_the_best_checkpoint(out_dir, run):
    flags = (f"--out_dir={out_dir}", "--max_new_tokens=40")
    printed = run(*flags)
    assert run.first.startswith(f"{out_dir} at iteration 10 (0.0M parameters) on cpu: jax ")
    texts = printed.split("-" * 15 + "\n")
    assert len(texts) == 3 and len(set(texts)) == 3
    assert all(len(text) == 1 + 40 + 1 for text in texts)  # the prompt, the new ones, the end of the line
    assert run(*flags) == printed != run(*flags, "--seed=1")


def test_each_setting_of_the_sampler_arrives_there_by_either_name(out_dir, run):
    """One token to choose from, by any of three settings, is greedy."""
    flags = (f"--out_dir={out_dir}", "--max_new_tokens=5", "--start=ROMEO")
    greedy = run(*flags, "--temperature=0")
    for narrow in "--top_k=1", "--top_p=1e-9", "--temperature=1e-9":
        assert run(*flags, narrow) == greedy
    assert run(*flags) != greedy
    same = ("--model=resume", f"--out-dir={out_dir}", "--max-new-tokens=5", "--prompt=ROMEO")
    assert run(*same, "--top-k=1", "--num-samples", "3") == greedy


def test_without_arguments_it_samples_the_default_model():
    command = [sys.executable, "jax_nanogpt/sample.py", "--max_new_tokens=1"]
    result = subprocess.run(command, cwd=PROJECT.parent, capture_output=True, encoding="utf-8", timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    first = result.stdout.splitlines()[0]
    assert first.startswith("gpt2") and "on cpu: jax" in first
    if first.startswith("gpt2-nano"):
        assert first.endswith("gpt2 is not in the local cache and HF_HUB_OFFLINE is set")


def test_the_dump_holds_what_was_printed(out_dir, run, tmp_path):
    dump = tmp_path / "d.npz"
    flags = (f"--out_dir={out_dir}", "--temperature=0", "--max_new_tokens=40", f"--dump={dump}")
    text = run(*flags, "--start=ROMEO").split("-" * 15)[0]
    tokenizer, saved = load_tokenizer(out_dir), np.load(dump)
    assert saved["prompt_ids"].tolist() == tokenizer.encode("ROMEO")
    assert saved["tokens"].shape == (40,) and saved["logits"].dtype == np.float32
    assert saved["logits"].argmax(axis=1).tolist() == saved["tokens"].tolist()
    assert text == "ROMEO" + tokenizer.decode(saved["tokens"].tolist()) + "\n"


def test_the_prompt_may_come_from_a_file_or_be_empty(out_dir, talker, run, tmp_path):
    (tmp_path / "prompt.txt").write_text("ROMEO", encoding="utf-8")
    flags = (f"--out_dir={out_dir}", "--max_new_tokens=5", "--temperature=0")
    assert run(*flags, f"--start=FILE:{tmp_path / 'prompt.txt'}") == run(*flags, "--start=ROMEO")
    folder, tokenizer = talker
    run(f"--init_from={folder}", "--max_new_tokens=5", "--start=", f"--dump={tmp_path / 'd.npz'}")
    assert np.load(tmp_path / "d.npz")["prompt_ids"].tolist() == [tokenizer.eot]


def test_end_of_text_ends_each_sample_unless_ignored(talker, run, tmp_path):
    folder, tokenizer = talker
    flags = (f"--init_from={folder}", "--max_new_tokens=100", "--num_samples=8", "--temperature=1", "--start=a")
    printed = run(*flags, "--ignore_eos", f"--dump={tmp_path / 'all.npz'}")
    whole = printed.removesuffix("\n").split("\n" + "-" * 15 + "\n")
    ends = [len(text.partition("<|endoftext|>")[0]) for text in whole]
    assert 0 < ends[0] < 33 < max(ends)  # one call generates 32 tokens
    printed = run(*flags, f"--dump={tmp_path / 'd.npz'}")
    texts = printed.removesuffix("\n").split("\n" + "-" * 15 + "\n")
    assert texts == [text[:end] for text, end in zip(whole, ends, strict=True)]
    every, until_end = np.load(tmp_path / "all.npz"), np.load(tmp_path / "d.npz")
    assert until_end["tokens"].tolist() == tokenizer.encode("a") * (ends[0] - 1) + [tokenizer.eot]
    assert len(every["tokens"]) == 100
    np.testing.assert_array_equal(until_end["logits"], every["logits"][: ends[0]])


@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-3), ("bfloat16", 3e-2), ("float16", 1e-2), ("int8", 5e-2)])
def test_verify_fails_if_logits_are_further_apart_than_the_limit(dtype, limit, beyond, out_dir, monkeypatch, capsys):
    """The last layer norm's scale is a factor of the logits: here it is right, or too large by more than the limit."""
    load = sample.load

    def load_scaled(args, given):
        *found, params = load(args, given)
        params["ln_f"]["scale"] *= 1 + 2.5 * limit
        monkeypatch.setattr(sample, "load", load)
        return *found, params

    if beyond:
        monkeypatch.setattr(sample, "load", load_scaled)
    flags = [f"--out_dir={out_dir}", f"--dtype={dtype}", "--verify", "--start=" + "ROMEO " * 9]
    assert sample.main(flags) == int(beyond)
    verdict = re.search(r"within (\S+) of .* largest: (.*) \(up to (.*)\)\n$", capsys.readouterr().out)
    assert verdict[2] == ("NOT as expected" if beyond else "as expected") and float(verdict[3]) == limit
    if beyond:
        assert float(verdict[1]) == pytest.approx(2.5 * limit, rel=0.5)
    else:
        assert (float(verdict[1]) > 1e-5) == (dtype != "float32")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature=-1"], "temperature must be"),
        (["--num_samples=0"], "--num-samples must be from 1 to 65536, got 0"),
        (["--num_samples=65537"], "--num-samples must be from 1 to 65536, got 65537"),
        (["--max_new_tokens=0"], "--max-new-tokens must be 1 or more, got 0"),
        ([f"--seed={2**63}"], f"--seed must be below 2**63, got {2**63}"),
        (["--init_from=nowhere"], "'nowhere'"),
        (["--out_dir=nowhere"], "nowhere"),
        (["--start=FILE:nowhere"], "nowhere"),
        (["--dtype=int4"], "--dtype"),
        (["--dump=nowhere/d.npz"], "--dump must be a file in an existing folder, got nowhere/d.npz"),
        (["--dump=/tmp"], "--dump must be a file in an existing folder, got /tmp"),
        (["--dump="], "--dump must be a file in an existing folder, got "),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--out_dir=OUT", "--start=ROMEO 7"], "'7' is not one of the"),
        (["--out_dir=OUT", "--start="], "prompt must not be empty: this model has no <|endoftext|>\n"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, message, out_dir, capsys):
    with pytest.raises(SystemExit) as caught:
        sample.main([flag.replace("OUT", str(out_dir)) for flag in flags])
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == ""
    assert message in printed.err and printed.err.count("\n") == 1


def test_weights_that_overflow_are_one_line_which_names_the_model(talker, tmp_path, capsys):
    folder, _ = talker
    config, params = weight_loader.load(folder)
    params["ln_f"]["bias"] *= 3e38
    weight_loader.save(tmp_path / "huge", config, params, folder)
    with pytest.raises(SystemExit) as caught:
        sample.main([f"--model={tmp_path / 'huge'}", "--start=a"])
    errors = capsys.readouterr().err
    assert caught.value.code == 2 and errors.count("\n") == 1
    assert errors.endswith(f"error: {tmp_path / 'huge'}: NaN or inf in the logits at position 1\n")


def test_a_bug_in_the_model_keeps_its_traceback(out_dir, monkeypatch):
    def broken(*_):
        raise ValueError("operands could not be broadcast")

    monkeypatch.setattr(sample.sampler, "prefill", broken)
    with pytest.raises(ValueError, match="broadcast"):
        sample.main([f"--out_dir={out_dir}"])


def test_a_compiled_program_that_is_damaged_or_cannot_be_written_changes_nothing(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(PROJECT.parent)}
    environment = {key: value for key, value in environment.items() if not key.startswith("JAX_")}
    code = """
from jax_nanogpt.runtime import choose_devices
choose_devices("cpu")
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: x + 1)(1.0))"""

    def kept(limit="unlimited"):
        command = f"ulimit -f {limit}; exec '{sys.executable}' -c '{code}'"
        done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, encoding="utf-8")
        assert (done.returncode, done.stdout, done.stderr) == (0, "2.0\n", "")
        return {path: path.stat().st_size for path in tmp_path.rglob("*-cache")}

    assert kept(limit=0) == {}
    whole = kept()
    for path, size in whole.items():
        os.truncate(path, size // 2)
    again = kept()
    assert whole and again.keys() == whole.keys() and min(again.values()) > max(whole.values()) // 2
