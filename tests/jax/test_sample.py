"""sample.py as a command: what they print, what they save, what they refuse."""

import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_nanogpt import sample, weight_loader
from jax_nanogpt.checkpoint import Checkpoints
from jax_nanogpt.model import GPT, GPTConfig, init_params
from shared.tokenizer import Characters, find_model, load_tokenizer

PROJECT = Path(weight_loader.__file__).parent
CHARS = "\n !EMORabcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def run(capsys):
    """sample.py in this process: run(flags...) -> what it printed."""

    def call(*flags):
        sample.main([*map(str, flags), "--device=cpu"])
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    """What train.py leaves: two checkpoints, the first of them the better one."""
    folder = tmp_path_factory.mktemp("out")
    Characters(CHARS).save(folder)
    config = GPTConfig(block_size=32, vocab_size=len(CHARS), n_layer=1, n_head=2, n_embd=32, bias=False, dropout=0.5)
    checkpoints = Checkpoints.start(folder)
    for step, loss in (10, 1.0), (20, 2.0):
        checkpoints.save(
            step, init_params(config, jax.random.key(step)), {"count": np.zeros(1)}, {"model": vars(config)}, loss
        )
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
    first, rest = printed.split("\n", 1)
    assert first.startswith(f"{out_dir} at iteration 10 (0.0M parameters) on cpu: jax ")
    texts = rest.split("-" * 15 + "\n")
    assert len(texts) == 3 and len(set(texts)) == 3
    assert all(len(text) == 1 + 40 + 1 for text in texts)  # the prompt, the new ones, the end of the line
    assert run(*flags) == printed != run(*flags, "--seed=1")


def test_each_setting_of_the_sampler_arrives_there(out_dir, run):
    """One token to choose from, by any of three settings, is greedy."""
    flags = (f"--out_dir={out_dir}", "--max_new_tokens=5", "--start=ROMEO")
    greedy = run(*flags, "--temperature=0")
    for narrow in "--top_k=1", "--top_p=1e-9", "--temperature=1e-9":
        assert run(*flags, narrow) == greedy
    assert run(*flags) != greedy


def test_without_arguments_it_samples_the_default_model_and_a_reader_may_leave_early():
    command = f"{sys.executable} jax_nanogpt/sample.py | head -n 1"
    options = {"cwd": PROJECT.parent, "capture_output": True, "encoding": "utf-8", "timeout": 300}
    result = subprocess.run(["bash", "-c", command], **options)
    assert result.stderr == ""
    assert result.stdout.startswith("gpt2") and "on cpu: jax" in result.stdout
    if result.stdout.startswith("gpt2-nano"):
        assert result.stdout.endswith("gpt2 is not in the local cache and HF_HUB_OFFLINE is set\n")


def test_the_dump_holds_what_was_printed(out_dir, run, tmp_path):
    dump = tmp_path / "d.npz"
    flags = (f"--out_dir={out_dir}", "--temperature=0", "--max_new_tokens=40", f"--dump={dump}")
    text = run(*flags, "--start=ROMEO").split("\n", 1)[1].split("-" * 15)[0]
    tokenizer, saved = load_tokenizer(out_dir), np.load(dump)
    assert saved["prompt_ids"].tolist() == tokenizer.encode("ROMEO")
    assert saved["tokens"].shape == (40,) and saved["logits"].dtype == np.float32
    assert saved["logits"].argmax(axis=1).tolist() == saved["tokens"].tolist()
    assert text == "ROMEO" + tokenizer.decode(saved["tokens"].tolist()) + "\n"


def test_the_prompt_may_come_from_a_file_or_be_empty(out_dir, talker, run, tmp_path):
    (tmp_path / "prompt.txt").write_text("ROMEO", encoding="utf-8")
    flags = (f"--out_dir={out_dir}", "--num_samples=1", "--max_new_tokens=5", "--temperature=0")
    assert run(*flags, f"--start=FILE:{tmp_path / 'prompt.txt'}") == run(*flags, "--start=ROMEO")
    folder, tokenizer = talker
    run(f"--init_from={folder}", "--max_new_tokens=5", "--start=", f"--dump={tmp_path / 'd.npz'}")
    assert np.load(tmp_path / "d.npz")["prompt_ids"].tolist() == [tokenizer.eot]


def test_end_of_text_ends_each_sample_unless_ignored(talker, run, tmp_path):
    folder, tokenizer = talker
    flags = (f"--init_from={folder}", "--max_new_tokens=100", "--num_samples=8", "--temperature=1", "--start=a")
    printed = run(*flags, "--ignore_eos", f"--dump={tmp_path / 'all.npz'}").split("\n", 1)[1]
    whole = printed.removesuffix("\n").split("\n" + "-" * 15 + "\n")
    ends = [len(text.partition("<|endoftext|>")[0]) for text in whole]
    assert 0 < ends[0] < 33 < max(ends)  # one call makes 32 tokens
    printed = run(*flags, f"--dump={tmp_path / 'd.npz'}").split("\n", 1)[1]
    texts = printed.removesuffix("\n").split("\n" + "-" * 15 + "\n")
    assert texts == [text[:end] for text, end in zip(whole, ends, strict=True)]
    every, until_end = np.load(tmp_path / "all.npz"), np.load(tmp_path / "d.npz")
    assert until_end["tokens"].tolist() == tokenizer.encode("a") * (ends[0] - 1) + [tokenizer.eot]
    assert len(every["tokens"]) == 100
    np.testing.assert_array_equal(until_end["logits"], every["logits"][: ends[0]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_samples_too(dtype, out_dir, run, tmp_path):
    flags = (f"--out_dir={out_dir}", "--max_new_tokens=3", "--num_samples=1", "--temperature=0")
    run(*flags, f"--dump={tmp_path / 'exact.npz'}")
    assert len(run(*flags, f"--dtype={dtype}", f"--dump={tmp_path / 'd.npz'}").split("\n", 1)[1]) == 5
    rough, exact = (np.load(tmp_path / name)["logits"][0] for name in ("d.npz", "exact.npz"))
    assert 0 < np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-3), ("bfloat16", 3e-2), ("float16", 1e-2)])
def test_verify_fails_where_logits_are_further_apart_than_the_limit(dtype, limit, beyond, out_dir, monkeypatch, capsys):
    """The last layer norm's scale is a factor of the logits: here it is too large by more than the limit, or right."""
    load_model, dtypes = sample.load_model, []

    def load(init_from, out_dir, given):
        *found, config, params, tokenizer = load_model(init_from, out_dir, "float32")
        if beyond and not dtypes:
            params["ln_f"]["scale"] *= 1 + 2.5 * limit
        dtypes.append(given)
        return *found, replace(config, dtype=given), params, tokenizer

    monkeypatch.setattr(sample, "load_model", load)
    with pytest.raises(SystemExit) as caught:
        sample.main([f"--out_dir={out_dir}", f"--dtype={dtype}", "--verify", "--start=" + "ROMEO " * 9])
    assert caught.value.code == int(beyond) and dtypes == [dtype, "float32"]
    verdict = re.search(r"within (\S+) of .* largest: (.*) \(up to (.*)\)\n$", capsys.readouterr().out)
    assert verdict[2] == ("NOT as expected" if beyond else "as expected") and float(verdict[3]) == limit
    assert not beyond or float(verdict[1]) == pytest.approx(2.5 * limit, rel=0.3)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--temperature=-1"], "temperature must be a number of at least 0"),
        (["--top_k=0"], "top_k must be a whole number of at least 1"),
        (["--top_p=2"], "top_p must be above 0 and at most 1"),
        (["--num_samples=0"], "num_samples is 0, 1 or more is expected"),
        (["--max_new_tokens=x"], "argument --max_new_tokens: invalid int value: 'x'"),
        (["--init_from=nowhere"], "'nowhere'"),
        (["--init_from=gpt2-xl"], "gpt2-xl is not in the local cache"),
        (["--out_dir=nowhere"], "out_dir is nowhere, which holds no checkpoint"),
        (["--start=FILE:nowhere"], "nowhere"),
        (["--dtype=int8"], "--dtype"),
        (["--device=gpu"], "device is gpu, but JAX finds only: cpu"),
        (["--dump=nowhere/d.npz"], "dump is nowhere/d.npz, a file in a folder that exists is expected"),
        (["--dump=/tmp"], "dump is /tmp, a file in a folder that exists is expected"),
        (["--dump="], "a file in a folder that exists is expected"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, complaint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
    with pytest.raises(SystemExit) as caught:
        sample.main()
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == ""
    assert complaint in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("start", "message"),
    [("ROMEO 7", "'7' is not one of the"), ("", "start must not be empty: this model has no <|endoftext|>\n")],
)
def test_a_prompt_that_the_model_cannot_read_is_refused(start, message, out_dir, run, capsys):
    with pytest.raises(SystemExit) as caught:
        run(f"--out_dir={out_dir}", f"--start={start}")
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == ""
    assert message in printed.err and printed.err.count("\n") == 1


def test_an_export_from_out_dir_loads_and_is_the_best_checkpoint(out_dir, tmp_path):
    weight_loader.main([f"--out_dir={out_dir}", f"--to={tmp_path}"])
    config, params = weight_loader.load(tmp_path)
    np.testing.assert_array_equal(params["wte"], Checkpoints(out_dir).restore_model(10)[1]["wte"])
    assert load_tokenizer(tmp_path).chars == CHARS and config.block_size == 32


@pytest.mark.parametrize("bias", [True, False])
def test_the_benchs_peer_is_the_same_model(bias):
    torch = pytest.importorskip("torch")
    from jax_nanogpt import bench_peer

    config = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32, bias=bias)
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params)
    tokens = np.arange(16)[None]
    ours, _ = GPT(config).apply({"params": params}, tokens)
    with torch.no_grad():
        theirs = bench_peer.TorchGPT(config).take(params).eval()(torch.tensor(tokens))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


KEEPS = """
from jax_nanogpt.device import choose_devices
choose_devices("cpu")
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: x + 1)(1.0))
"""


def test_what_was_compiled_and_is_damaged_or_cannot_be_kept_is_no_matter(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(PROJECT.parent)}
    environment = {key: value for key, value in environment.items() if not key.startswith("JAX_")}

    def kept(limit=resource.RLIM_INFINITY):
        limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))  # noqa: E731
        options = {"env": environment, "capture_output": True, "text": True, "preexec_fn": limited}
        done = subprocess.run([sys.executable, "-c", KEEPS], **options)
        assert (done.returncode, done.stdout, done.stderr) == (0, "2.0\n", "")
        return {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}

    assert kept(limit=100) == {}
    whole = kept()
    assert whole
    for path, size in whole.items():
        os.truncate(path, size // 2)
    again = kept()
    assert again.keys() == whole.keys() and min(again.values()) > max(whole.values()) // 2
