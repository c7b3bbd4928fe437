"""The four lines, example.py, bench.py and the notebook on this CPU: what they print, save and refuse."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import torch
import transformers

from qaic_gpt2 import bench, example, generation
from qaic_gpt2.auto_model import QEFFAutoModelForCausalLM
from shared.sampling import Sampler
from shared.tokenizer import find_model, load_tokenizer

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


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(NANO)


@pytest.fixture(scope="module")
def reference():
    model = transformers.GPT2LMHeadModel.from_pretrained(NANO, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # it would end the text, or make its logit the least
    return model


def greedy(reference, ids, count):
    ids = torch.tensor([ids])
    made = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return made[0, ids.shape[1] :].tolist()


def run(*flags, script="example.py", cwd=PROJECT):
    command = [sys.executable, os.path.relpath(PROJECT / script, cwd), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", timeout=300)


def test_the_four_lines_work_without_an_export(tokenizer, reference, capsys):
    model = QEFFAutoModelForCausalLM.from_pretrained("gpt2-nano")
    model.compile(num_cores=16)
    info = model.generate(prompts=["Hi there!!"], tokenizer=tokenizer)
    ids = tokenizer("Hi there!!")["input_ids"]
    expected = greedy(reference, ids, 128 - len(ids))  # to the end of ctx_len's default
    assert info.generated_ids[0][0, : len(expected)].tolist() == expected
    assert info.generated_texts == [[tokenizer.decode(expected, clean_up_tokenization_spaces=False)]]
    printed = capsys.readouterr().out
    assert info.generated_texts[0][0] in printed and re.search(STATS, printed)
    assert "without effect here: num_cores=16" in printed


def test_generate_compiles_by_the_defaults_where_nothing_was_compiled(tokenizer):
    model = QEFFAutoModelForCausalLM.from_pretrained("gpt2-nano")
    assert model.generate(tokenizer, ["ROMEO:"], generation_len=3).generated_ids[0].shape == (1, 128)
    assert model.qpc_path.is_dir()


def test_200_greedy_tokens_are_transformers(tokenizer, reference):
    model = QEFFAutoModelForCausalLM.from_pretrained(NANO)
    model.compile(ctx_len=256)
    info = model.generate(tokenizer, ["ROMEO:"], generation_len=200, ignore_eos=True, stream=False)
    assert info.generated_ids[0][0, :200].tolist() == greedy(reference, tokenizer.encode("ROMEO:"), 200)


def test_prompts_of_unequal_lengths_give_in_a_batch_what_they_give_alone(tokenizer, reference):
    prompts = ["ROMEO:", "The assert statement is a convenient way to insert debugging " * 3, "", "Hi"]
    model = QEFFAutoModelForCausalLM.from_pretrained(NANO)
    model.compile(batch_size=4, prefill_seq_len=8)
    info = model.generate(tokenizer, prompts, generation_len=30, ignore_eos=True, return_logits=True)
    for row, prompt in enumerate(prompts):
        expected = greedy(reference, tokenizer.encode(prompt) or [tokenizer.eos_token_id], 30)
        assert info.generated_ids[0][row, :30].tolist() == expected
        assert np.argmax(info.logits[row], axis=1).tolist() == expected
        assert info.generated_texts[0][row] == tokenizer.decode(expected, clean_up_tokenization_spaces=False)


def test_batches_follow_one_another_by_qefficients_rule(tokenizer, capsys):
    model = QEFFAutoModelForCausalLM.from_pretrained(NANO)
    model.compile(batch_size=2)
    info = model.generate(tokenizer, ["A", "B", "C", "D", "E"], generation_len=4)
    assert [len(texts) for texts in info.generated_texts] == [2, 2]
    assert "the last 1 are dropped" in capsys.readouterr().out
    info = model.generate(tokenizer, ["A"], generation_len=4)
    assert info.generated_texts[0][0] == info.generated_texts[0][1]
    assert "are repeated" in capsys.readouterr().out


def test_both_kinds_of_tokenizer_give_the_same(tokenizer):
    model = QEFFAutoModelForCausalLM.from_pretrained(NANO)
    infos = [
        model.generate(one, ["Grüße, 世界"], generation_len=40, sampler=Sampler(1.5, seed=1))
        for one in (tokenizer, load_tokenizer(NANO))
    ]
    assert infos[0].generated_texts == infos[1].generated_texts
    np.testing.assert_array_equal(infos[0].generated_ids, infos[1].generated_ids)


def test_sampling_draws_what_the_shared_sampler_draws(tokenizer):
    model = QEFFAutoModelForCausalLM.from_pretrained(NANO)
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


def test_generated_times_add_up(tokenizer):
    model = QEFFAutoModelForCausalLM.from_pretrained(NANO)
    model.compile()
    began = time.perf_counter()
    perf = model.generate(tokenizer, ["ROMEO:"], generation_len=21, ignore_eos=True).perf_metrics
    took = time.perf_counter() - began
    assert 0 < perf.prefill_time < perf.total_time < took
    assert 20 / perf.decode_perf == pytest.approx(perf.total_time - perf.prefill_time)
    assert 20 / perf.total_perf == pytest.approx(perf.total_time)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (
            lambda m, t: m.compile(ctx_len=257),
            "ctx_len is 257, at least prefill_seq_len (32) and at most the model's 256",
        ),
        (lambda m, t: m.compile(ctx_len=16), "ctx_len is 16"),
        (lambda m, t: m.compile(num_cores=0), "num_cores is 0"),
        (lambda m, t: m.compile(batch_size="2"), "batch_size is '2'"),
        (lambda m, t: m.compile(full_batch_size=4), "full_batch_size is 4"),
        (lambda m, t: m.compile("nowhere.onnx"), "onnx_path is nowhere.onnx"),
        (lambda m, t: m.generate(t, ["a"], generation_len=0), "generation_len is 0"),
        (lambda m, t: m.generate(t, "a"), "prompts is 'a', a list of texts is expected"),
        (lambda m, t: m.generate(t, []), "prompts is []"),
        (lambda m, t: m.generate(t, ["x y " * 200]), "fewer than ctx_len (128) are expected"),
        (lambda m, t: m.from_pretrained(NANO, continuous_batching=True), "continuous_batching is True"),
        (lambda m, t: m.from_pretrained(NANO, dtype="int8"), "dtype is 'int8', one of float32, float16 is expected"),
        (lambda m, t: m.from_pretrained("nowhere"), "model 'nowhere' is neither"),
        (lambda m, t: m.from_pretrained(NANO, dtype=torch.float16).compile(int8_matmul=True), "int8_matmul starts"),
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
    assert [*tmp_path.iterdir()] == [dump]


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


def test_an_interrupt_is_one_line_and_leaves_nothing_half_written(tmp_path):
    environment = {**os.environ, "QEFF_HOME": str(tmp_path)}
    command = [sys.executable, "example.py", "--model=gpt2-nano", "--ignore-eos", f"--dump={tmp_path / 'd.npz'}"]
    started = subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    started.stdout.readline()  # it found its model, and exports now
    started.send_signal(signal.SIGINT)
    _, error = started.communicate(timeout=60)
    assert started.returncode == 130 and error.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".") or path.suffix in (".part", ".npz")]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--temperature=-1"], "temperature must be a number of at least 0"),
        (["--top-k=0"], "top_k must be a whole number of at least 1"),
        (["--top-p=2"], "top_p must be above 0 and at most 1"),
        (["--max-new-tokens=0"], "max_new_tokens is 0, 1 or more is expected"),
        (["--max-new-tokens=x"], "argument --max-new-tokens: invalid int value: 'x'"),
        (["--num-cores=0"], "num_cores is 0"),
        (["--prefill-seq-len=-1"], "prefill_seq_len is -1"),
        (["--ctx-len=300"], "ctx_len is 300, at least prefill_seq_len (32) and at most the model's 256 positions"),
        (["--prompt=" + "a b " * 300], "fewer than ctx_len (256) are expected"),
        (["--model=nowhere"], "'nowhere'"),
        (["--model=gpt2-xl"], "gpt2-xl is not in the local cache"),
        (["--dtype=bfloat16"], "--dtype"),
        (["--device=tpu"], "device is tpu, one of auto, cpu, qaic is expected"),
        (["--device=qaic"], "device is qaic, but QEfficient is not installed: pip install -r requirements.txt"),
        (["--dump=nowhere/d.npz"], "dump is nowhere/d.npz, a file in a folder that exists is expected"),
        (["--dump=/tmp"], "dump is /tmp, a file in a folder that exists is expected"),
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


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_verify_compares_with_float32(dtype, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["example.py", "--model=gpt2-nano", "--verify", f"--dtype={dtype}"])
    with pytest.raises(SystemExit) as caught:
        example.main()
    assert caught.value.code == 0 and ": as expected" in capsys.readouterr().out


def test_bench_prints_one_json_document_last(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--model=gpt2-nano", "--new-tokens=8"])
    monkeypatch.setattr(bench, "PAIRS", 1)
    monkeypatch.setattr(bench, "held_out_texts", lambda folder, full=bench.held_out_texts: full(folder)[:1])
    bench.main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["project"] == "qaic_gpt2"
    rows = {row["work"]: row for row in document["results"] if row["work"] != "perplexity"}
    assert rows.keys() >= {"prefill", "decode", "decode_int8", "decode_batch8", "decode_long"}
    for row in rows.values():
        assert row["tokens_per_s"] > 0 and row["peer"]["tokens_per_s"] > 0 and row["ratio"] > 0
        assert row["compile_s"] > 0 and row["ttft_ms"] > 0 and row["peak_rss_mb"] > 100
    assert rows["decode"]["mbu"] > 0
    found = {row["dtype"]: row["perplexity"] for row in document["results"] if row["work"] == "perplexity"}
    assert found.keys() == {"float32", "float16", "int8"}


def test_perplexity_counts_every_token_once(reference):
    """Beside transformers' loss over the same windows; int8 within 1 % of float32."""
    texts = [ids[:300] for ids in bench.held_out_texts(NANO)[:3]]
    expected, count = 0.0, 0
    for ids in texts:
        for start in range(0, len(ids) - 1, 255):
            window = torch.tensor([ids[start : start + 256]])
            with torch.no_grad():
                expected += float(reference(window, labels=window).loss) * (window.shape[1] - 1)
            count += window.shape[1] - 1
    sizes = {"batch_size": 4, "ctx_len": 256, "prefill_seq_len": 1}
    exact = bench.perplexity(bench.compiled(NANO, **sizes)[0], texts)
    assert exact == (pytest.approx(np.exp(expected / count), rel=1e-4), count)
    small, _ = bench.perplexity(bench.compiled(NANO, "int8", **sizes)[0], texts)
    assert small == pytest.approx(exact[0], rel=0.01)


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
