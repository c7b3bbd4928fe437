"""The four lines, example.py and the notebook on this CPU: what they print, save and refuse."""

import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import torch
import transformers

from qaic_gpt2 import example, generation, quantizer
from qaic_gpt2.auto_model import QEFFAutoModelForCausalLM
from shared.sampling import Sampler
from shared.tokenizer import find_model, load_tokenizer

pytestmark = pytest.mark.engine

PROJECT = Path(example.__file__).parent
NANO = find_model("gpt2-nano").folder
STATS = r"""
=+ Performance Stats =+
Average Prefill time a\.k\.a TTFT is= \d+\.\d+ sec
Decode is= \d+\.\d+ tokens/sec
Total is= \d+\.\d+ tokens/sec
Total \(E2E\) inference time is= \d+\.\d+ sec
=+
"""


def greedy(reference, ids, made):
    """What transformers would take for each id of made: made itself, where it is greedy."""
    with torch.no_grad():
        return reference(torch.tensor([[*ids, *made]])).logits[0, len(ids) - 1 : -1].argmax(-1).tolist()


def run(*flags, script="example.py", cwd=PROJECT):
    command = [sys.executable, os.path.relpath(PROJECT / script, cwd), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", timeout=300)


def test_the_four_lines_work_without_an_export(tokenizer, nano_reference, capsys):
    model = QEFFAutoModelForCausalLM.from_pretrained("gpt2-nano")
    model.compile(num_cores=16)
    info = model.generate(prompts=["Hi there!!"], tokenizer=tokenizer)
    ids = tokenizer("Hi there!!")["input_ids"]
    made = info.generated_ids[0][0, : 128 - len(ids) + 1].tolist()  # to the end of ctx_len's default
    assert made == greedy(nano_reference, ids, made)
    assert info.generated_texts == [[tokenizer.decode(made, clean_up_tokenization_spaces=False)]]
    printed = capsys.readouterr().out
    assert info.generated_texts[0][0] in printed and re.search(STATS, printed)
    assert "without effect here: num_cores=16" in printed


def test_generate_compiles_by_the_defaults_where_nothing_was_compiled(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("QEFF_HOME", str(tmp_path))
    model = QEFFAutoModelForCausalLM.from_pretrained("gpt2-nano")
    assert model.generate(tokenizer, ["ROMEO:"], generation_len=3).generated_ids[0].shape == (1, 128)
    assert model.qpc_path.is_dir()


def test_200_greedy_tokens_are_transformers(nano, compiled, tokenizer, nano_reference):
    model = compiled(nano, ctx_len=256)
    info = model.generate(tokenizer, ["ROMEO:"], generation_len=200, ignore_eos=True, stream=False)
    made = info.generated_ids[0][0, :200].tolist()
    assert made == greedy(nano_reference, tokenizer.encode("ROMEO:"), made)


def test_prompts_of_unequal_lengths_give_in_a_batch_what_they_give_alone(nano, compiled, tokenizer, nano_reference):
    prompts = ["ROMEO:", "The assert statement is a convenient way to insert debugging " * 3, "", "Hi"]
    model = compiled(nano, batch_size=4, prefill_seq_len=8)
    info = model.generate(tokenizer, prompts, generation_len=30, ignore_eos=True, return_logits=True)
    for row, prompt in enumerate(prompts):
        made = info.generated_ids[0][row, :30].tolist()
        assert made == greedy(nano_reference, tokenizer.encode(prompt) or [tokenizer.eos_token_id], made)
        assert np.argmax(info.logits[row], axis=1).tolist() == made
        assert info.generated_texts[0][row] == tokenizer.decode(made, clean_up_tokenization_spaces=False)


def test_batches_follow_one_another_by_qefficients_rule(nano, compiled, tokenizer, nano_reference, capsys):
    model = compiled(nano, batch_size=2)
    info = model.generate(tokenizer, ["A", "B", "C", "D", "E"], generation_len=4, ignore_eos=True)
    assert [len(texts) for texts in info.generated_texts] == [2, 2]
    for prompt, ids in zip("ABCD", np.concatenate(info.generated_ids), strict=True):
        made = ids[:4].tolist()
        assert made == greedy(nano_reference, tokenizer.encode(prompt), made)
    assert "the last 1 are dropped" in capsys.readouterr().out
    info = model.generate(tokenizer, ["A"], generation_len=4)
    assert info.generated_texts[0][0] == info.generated_texts[0][1]
    assert "are repeated" in capsys.readouterr().out


def test_both_kinds_of_tokenizer_give_the_same(nano, compiled, tokenizer):
    model = compiled(nano)
    infos = [
        model.generate(one, ["Grüße, 世界"], generation_len=40, sampler=Sampler(1.5, seed=1))
        for one in (tokenizer, load_tokenizer(NANO))
    ]
    assert infos[0].generated_texts == infos[1].generated_texts
    np.testing.assert_array_equal(infos[0].generated_ids, infos[1].generated_ids)


def test_sampling_draws_what_the_shared_sampler_draws(nano, compiled, tokenizer):
    model = compiled(nano)
    settings = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 3}
    info = model.generate(tokenizer, ["ROMEO:"], generation_len=30, sampler=Sampler(**settings), return_logits=True)
    again = Sampler(**settings)
    tokens = [int(again(row[None])[0]) for row in info.logits[0]]
    assert info.generated_ids[0][0, : len(tokens)].tolist() == tokens
    assert tokens != np.argmax(info.logits[0], axis=1).tolist()


def test_the_statistics_are_in_qefficients_words_and_of_the_whole_batch():
    metrics = generation.PerfMetrics(prefill_time=0.5, decode_perf=19 / 2, total_perf=19 / 2.5, total_time=2.5)
    assert str(generation.ExecInfo(3, [], [], metrics)).splitlines() == [
        "Average Prefill time a.k.a TTFT is= 0.50 sec",
        "Decode is= 28.50 tokens/sec",
        "Total is= 22.80 tokens/sec",
        "Total (E2E) inference time is= 2.50 sec",
    ]


class Clock:
    """Each call of generate_batch's parts takes the time that it says, and nothing else takes any."""

    eot, ctx_len, logits, now = None, 32, np.zeros((2, 1, 5)), 0

    def perf_counter(self):
        return self.now

    def encode(self, text):
        self.now += 1
        return [0] * len(text)

    def prefill(self, prompts):
        self.now += 4
        return np.zeros((2, 5))

    def __call__(self, ids, positions):
        self.now += 2
        return np.zeros((2, 5))

    def to_bytes(self, id):
        return b"a"


@pytest.mark.parametrize(("count", "decode", "total"), [(6, 5 / 10, 5 / 16), (2, 1 / 2, 1 / 8), (1, 0, 0)])
def test_statistics_count_new_tokens_and_the_first_comes_with_prefill(monkeypatch, count, decode, total):
    """Of two rows; QEfficient counts the tokens after the first, for both rates."""
    clock = Clock()
    monkeypatch.setattr(generation, "time", clock)
    info = generation.generate_batch(clock, clock, ["abc", "abcdefg"], count, Sampler(0), True, False, False)
    assert vars(info.perf_metrics) == {
        "prefill_time": 2 * 1 + 4,  # with tokenizing
        "decode_perf": decode,
        "total_perf": total,
        "total_time": 2 * 1 + 4 + 2 * (count - 1),
    }


def test_statistics_end_with_the_last_text(monkeypatch):
    """A text that ends early is no faster: its tokens count, and not those that were asked for."""
    clock = Clock()
    clock.eot = 1
    monkeypatch.setattr(generation, "time", clock)
    tokens = itertools.chain([[0, 0], [0, 1], [0, 0]], itertools.repeat([1, 0]))
    perf = generation.generate_batch(
        clock, clock, ["a", "b"], 20, lambda _: np.array(next(tokens)), False, False, False
    )
    assert vars(perf.perf_metrics) == {"prefill_time": 6, "decode_perf": 3 / 6, "total_perf": 3 / 12, "total_time": 12}


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (
            lambda m, t: m.compile(ctx_len=257),
            "ctx_len must be at least prefill_seq_len (32) and at most the model's 256 positions, got 257",
        ),
        (lambda m, t: m.compile(ctx_len=16, prefill_seq_len=17), "ctx_len must be at least prefill_seq_len (17)"),
        (lambda m, t: m.compile(num_cores=0), "num_cores must be a whole number of at least 1, got 0"),
        (lambda m, t: m.compile(batch_size="2"), "batch_size must be a whole number of at least 1, got '2'"),
        (lambda m, t: m.compile(full_batch_size=4), "full_batch_size must be None on a CPU, got 4"),
        (lambda m, t: m.compile("nowhere.onnx"), "onnx_path must be a file, got nowhere.onnx"),
        (
            lambda m, t: m.generate(t, ["a"], generation_len=0),
            "generation_len must be a whole number of at least 1, got 0",
        ),
        (lambda m, t: m.generate(t, "a"), "prompts must be a list of texts, got 'a'"),
        (lambda m, t: m.generate(t, []), "prompts must be a list of texts, got []"),
        (lambda m, t: m.generate(t, ["Z" * 129]), "prompt must have at most ctx_len (128) tokens, got 129"),
        (
            lambda m, t: m.from_pretrained(NANO, continuous_batching=True),
            "continuous_batching must be None or False on a CPU, got True",
        ),
        (lambda m, t: m.from_pretrained(NANO, dtype="int8"), "dtype must be float32 or float16, got 'int8'"),
        (lambda m, t: m.from_pretrained("nowhere"), "model 'nowhere' is neither"),
        (
            lambda m, t: m.from_pretrained(NANO, dtype=torch.float16).compile(int8_matmul=True),
            "dtype must be float32 with int8_matmul, got float16",
        ),
    ],
)
def test_what_the_class_cannot_do_is_said_in_a_line(call, complaint, tokenizer):
    with pytest.raises(ValueError) as caught:
        call(QEFFAutoModelForCausalLM.from_pretrained(NANO), tokenizer)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_example_without_arguments_runs_the_default_model():
    result = run(cwd=PROJECT.parent)
    assert (result.returncode, result.stderr) == (0, "")
    first, *_ = result.stdout.splitlines()
    assert re.match(r"gpt2\S* \(\d+\.\dM parameters\) on cpu: onnxruntime [\d.]+, no Cloud AI 100 found", first)
    if first.startswith("gpt2-nano"):
        assert first.endswith("; gpt2 is not in the local cache and HF_HUB_OFFLINE is set")
    assert "\nHi there!!" in result.stdout and re.search(STATS, result.stdout)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_the_dump_holds_what_was_printed(tmp_path, dtype, capsys, monkeypatch):
    dump = tmp_path / "d.npz"
    flags = ["--model=gpt2-nano", "--max-new-tokens=150", "--ignore-eos", f"--precision={dtype}", f"--dump={dump}"]
    monkeypatch.setattr(sys, "argv", ["example.py", *flags, "--prompt=ROMEO:", "--prompt=JULIET: O"])
    example.main()
    printed = capsys.readouterr().out
    bpe, saved = load_tokenizer(NANO), np.load(dump)
    assert saved["prompt_ids"].tolist() == bpe.encode("ROMEO:")
    assert saved["tokens"].shape == (150,) and saved["logits"].shape == (150, bpe.n_vocab)
    assert saved["logits"].dtype == np.float32
    assert saved["logits"].argmax(axis=1).tolist() == saved["tokens"].tolist()
    assert "\n\nROMEO:" + bpe.decode(saved["tokens"].tolist()) + "\n" in printed
    assert "-" * 15 + "\nJULIET: O" in printed
    if dtype != "float16" or platform.machine() == "x86_64":  # Arm may have the kernels
        assert ("float16 is computed in float32" in printed) == (dtype == "float16")
    assert [*tmp_path.iterdir()] == [dump]


def test_the_flags_reach_the_sampler(tmp_path):
    dump = tmp_path / "d.npz"
    flags = ["--temperature=1.5", "--top-k=40", "--top-p=0.7", "--seed=3", "--ignore-eos", "--max-new-tokens=40"]
    example.main(["--model=gpt2-nano", f"--dump={dump}", *flags])
    saved, sampler = np.load(dump), Sampler(1.5, 40, 0.7, 3)
    assert saved["tokens"].tolist() == [sampler(row) for row in saved["logits"]]


def test_a_text_ends_at_the_contexts_end_with_a_line_that_says_so(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["example.py", "--model=gpt2-nano", "--max-new-tokens=500", "--ignore-eos"])
    example.main()
    assert "(the end of the context: 256 tokens)" in capsys.readouterr().out


def test_end_of_text_ends_a_text_unless_ignored(tmp_path, capsys, monkeypatch):
    """A model that says <|endoftext|> for ever: only its embedding is not zero."""
    folder = shutil.copytree(NANO, tmp_path / "model")
    model = transformers.GPT2LMHeadModel.from_pretrained(NANO, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.bias += 1
        model.transformer.wte.weight[1407] = 1
    model.save_pretrained(folder)
    for more, count, text in ([], 1, ""), (["--ignore-eos"], 9, "<|endoftext|>" * 9):
        flags = [f"--model={folder}", "--max-new-tokens=9", f"--dump={tmp_path / 'd.npz'}", *more]
        monkeypatch.setattr(sys, "argv", ["example.py", *flags])
        example.main()
        assert f"\n\nHi there!!{text}\n\n===" in capsys.readouterr().out
        assert np.load(tmp_path / "d.npz")["tokens"].tolist() == [1407] * count


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} example.py --model=gpt2-nano | head -n 1"
    result = subprocess.run(["bash", "-c", command], cwd=PROJECT, capture_output=True, encoding="utf-8", timeout=300)
    assert result.stdout.startswith("gpt2-nano") and result.stderr == ""


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--temperature=-1"], "temperature must be a number of at least 0"),
        (["--top-k=0"], "top_k must be a whole number of at least 1"),
        (["--top-p=2"], "top_p must be above 0 and at most 1"),
        (["--max-new-tokens=0"], "max_new_tokens must be at least 1, got 0"),
        (["--max-new-tokens=x"], "argument --max-new-tokens: invalid int value: 'x'"),
        (["--num-cores=0"], "num_cores must be at least 1, got 0"),
        (["--prefill-seq-len=-1"], "prefill_seq_len must be at least 1, got -1"),
        (
            ["--ctx-len=300"],
            "ctx_len must be at least prefill_seq_len (32) and at most the model's 256 positions, got 300",
        ),
        (["--prompt=" + "Z" * 257], "prompt must have at most ctx_len (256) tokens, got 257"),
        (["--model=nowhere"], "'nowhere'"),
        (["--model=gpt2-xl"], "gpt2-xl is not in the local cache"),
        (["--dtype=bfloat16"], "--dtype"),
        (["--device=tpu"], "device must be auto, cpu or qaic, got tpu"),
        (["--device=qaic"], "device must be auto or cpu here, got qaic: QEfficient is not installed: pip install"),
        (["--dump=nowhere/d.npz"], "dump must be a file in a folder that exists, got nowhere/d.npz"),
        (["--dump=/tmp"], "dump must be a file in a folder that exists, got /tmp"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, complaint, monkeypatch, capsys):
    model = [] if any(flag.startswith("--model") for flag in flags) else ["--model=gpt2-nano"]
    monkeypatch.setattr(sys, "argv", ["example.py", *model, *flags])
    with pytest.raises(SystemExit) as caught:
        example.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2 and complaint in error and error.count("\n") == 1


def test_a_home_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(sys, "argv", ["example.py", "--model=gpt2-nano"])
    with pytest.raises(SystemExit) as caught:
        example.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2 and str(tmp_path / "file") in error and error.count("\n") == 1


LIMITS = {"float32": 1e-3, "float16": 1e-2, "int8": 5e-2}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("times", "status"), [(0, 0), (0.99, 0), (1.01, 1), (-1.01, 1), (np.nan, 1), (np.inf, 1)])
def test_verify_ends_with_1_beyond_its_limit(dtype, times, status, capsys):
    expected = np.array([[1.0, -4, 2]])
    found = expected + np.array([[0, 0, 4 * times * LIMITS[dtype]]])  # of the largest
    exact, model = (
        types.SimpleNamespace(session=types.SimpleNamespace(prefill=lambda prompts, logits=logits: logits))
        for logits in (expected, found)
    )
    with pytest.raises(SystemExit) as caught:
        example.verify(model, exact, "cpu", [[1, 2]], dtype)
    verdict = "NOT as expected" if status else ": as expected"
    assert caught.value.code == status and verdict in capsys.readouterr().out


@pytest.mark.parametrize(("factor", "status"), [(1, 0), (1.2, 1)])
def test_verify_finds_wrong_scales(factor, status, tmp_path, monkeypatch, capsys):
    blocks = quantizer.blocks
    monkeypatch.setattr(quantizer, "blocks", lambda *given: (blocks(*given)[0], blocks(*given)[1] * np.float32(factor)))
    monkeypatch.setenv("QEFF_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        example.main(["--model=gpt2-nano", "--verify", "--dtype=int8"])
    assert caught.value.code == status and "as expected (up to 0.05)" in capsys.readouterr().out


def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    notebook = nbformat.read(PROJECT / "QEfficientGPT2.ipynb", as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": PROJECT}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert "on cpu: onnxruntime" in text and re.search(STATS, text)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
