"""sample.py as a command: what they print, what they save, what they refuse."""

import os
import resource
import subprocess
import sys
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


def run(*flags, script="sample.py", cwd=PROJECT):
    command = [sys.executable, os.path.relpath(PROJECT / script, cwd), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", timeout=300)


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    """What train.py leaves: two checkpoints, the first of them the better one."""
    folder = tmp_path_factory.mktemp("out")
    Characters(CHARS).save(folder)
    config = GPTConfig(block_size=32, vocab_size=len(CHARS), n_layer=2, n_head=2, n_embd=32, bias=False, dropout=0.5)
    checkpoints = Checkpoints(folder, "afresh")
    for step, loss in (10, 1.0), (20, 2.0):
        checkpoints.save(
            step, init_params(config, jax.random.key(step)), {"count": np.zeros(1)}, {"model": vars(config)}, loss
        )
    return folder


def test_the_documented_command_samples_the_best_checkpoint(out_dir):
    result = run(f"--out_dir={out_dir}", "--max_new_tokens=50")
    assert result.returncode == 0 and result.stderr == ""
    first, rest = result.stdout.split("\n", 1)
    assert first.startswith(f"{out_dir} at iteration 10 (0.0M parameters) on cpu: jax ")
    texts = rest.split("-" * 15 + "\n")
    assert len(texts) == 3 and len(set(texts)) == 3
    assert all(len(text) == 1 + 50 + 1 for text in texts)  # the prompt, the new ones, the end of the line
    assert run(f"--out_dir={out_dir}", "--max_new_tokens=50").stdout == result.stdout
    assert run(f"--out_dir={out_dir}", "--max_new_tokens=50", "--seed=1").stdout != result.stdout


def test_without_arguments_it_samples_the_default_model():
    result = run("--num_samples=1", "--max_new_tokens=40", cwd=PROJECT.parent)
    assert result.returncode == 0, result.stderr
    first = result.stdout.splitlines()[0]
    assert first.startswith("gpt2") and "on cpu: jax" in first
    if first.startswith("gpt2-nano"):
        assert first.endswith("gpt2 is not in the local cache and HF_HUB_OFFLINE is set")


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} sample.py --init_from=gpt2-nano --num_samples=2 --max_new_tokens=100 | head -n 1"
    result = subprocess.run(["bash", "-c", command], cwd=PROJECT, capture_output=True, encoding="utf-8", timeout=300)
    assert result.stdout.startswith("gpt2-nano") and result.stderr == ""


def test_the_dump_holds_what_was_printed(tmp_path):
    dump = tmp_path / "d.npz"
    flags = ("--init_from=gpt2-nano", "--temperature=0", "--max_new_tokens=40", "--ignore_eos", f"--dump={dump}")
    result = run(*flags, "--start=ROMEO:")
    assert result.returncode == 0, result.stderr
    tokenizer, saved = load_tokenizer(find_model("gpt2-nano").folder), np.load(dump)
    assert saved["prompt_ids"].tolist() == tokenizer.encode("ROMEO:")
    assert saved["tokens"].shape == (40,) and saved["logits"].dtype == np.float32
    assert saved["logits"].argmax(axis=1).tolist() == saved["tokens"].tolist()
    text = result.stdout.split("\n", 1)[1].split("-" * 15)[0]
    assert text == "ROMEO:" + tokenizer.decode(saved["tokens"].tolist()) + "\n"


def test_the_prompt_may_come_from_a_file_or_be_empty(tmp_path):
    (tmp_path / "prompt.txt").write_text("ROMEO:", encoding="utf-8")
    flags = ("--init_from=gpt2-nano", "--num_samples=1", "--max_new_tokens=5", "--temperature=0")
    assert run(*flags, f"--start=FILE:{tmp_path / 'prompt.txt'}").stdout == run(*flags, "--start=ROMEO:").stdout
    dump = tmp_path / "d.npz"
    assert run(*flags, "--start=", f"--dump={dump}").returncode == 0
    assert np.load(dump)["prompt_ids"].tolist() == [load_tokenizer(find_model("gpt2-nano").folder).eot]


def test_end_of_text_ends_a_sample_unless_ignored(tmp_path):
    """A model that says <|endoftext|> for ever: only its embedding is not zero."""
    source = find_model("gpt2-nano").folder
    config, params = weight_loader.load(source)
    tokenizer = load_tokenizer(source)
    params = jax.tree.map(lambda p: 0 * p, params)
    params["ln_f"]["bias"] += 1
    params["wte"] = params["wte"].at[tokenizer.eot].set(1)
    weight_loader.save(tmp_path, config, params, source, tokenizer.eot)
    flags = (f"--init_from={tmp_path}", "--max_new_tokens=40", "--num_samples=2", f"--dump={tmp_path / 'd.npz'}")
    for more, count, text in ([], 1, ""), (["--ignore_eos"], 40, "<|endoftext|>" * 40):
        printed = run(*flags, *more).stdout.split("\n", 1)[1]
        assert printed == f"\n{text}\n" + "-" * 15 + f"\n\n{text}\n"
        assert np.load(tmp_path / "d.npz")["tokens"].tolist() == [tokenizer.eot] * count


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_samples_too(dtype, out_dir):
    result = run(f"--out_dir={out_dir}", f"--dtype={dtype}", "--max_new_tokens=40", "--num_samples=1")
    assert result.returncode == 0 and len(result.stdout.split("\n", 1)[1]) == 42


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


def test_a_prompt_that_the_model_cannot_read_is_refused(out_dir):
    unknown, empty = (run(f"--out_dir={out_dir}", f"--start={start}") for start in ("ROMEO 7", ""))
    assert (unknown.returncode, empty.returncode) == (2, 2)
    assert "'7' is not one of the" in unknown.stderr and "start is empty" in empty.stderr


def test_an_export_from_out_dir_loads_and_is_the_best_checkpoint(out_dir, tmp_path):
    result = run(f"--out_dir={out_dir}", f"--to={tmp_path}", script="weight_loader.py")
    assert result.returncode == 0, result.stderr
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
    del environment["JAX_COMPILATION_CACHE_DIR"], environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]

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
    assert kept().keys() == whole.keys() and min(kept().values()) > max(whole.values()) // 2
