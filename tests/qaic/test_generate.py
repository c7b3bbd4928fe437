"""The four lines, example.py and the notebook on this CPU: what they print, save and refuse."""

import ast
import copy
import functools
import inspect
import itertools
import json
import platform
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import hypothesis
import nbclient
import nbformat
import numpy as np
import pytest
import torch
import transformers
from hypothesis import strategies as st

from qaic_gpt2 import example, fusion, generation, keywords, model
from qaic_gpt2.auto_model import QEFFAutoModelForCausalLM
from qaic_gpt2.drafting import Drafting, look_up
from shared.sampling import Sampler
from shared.tokenizer import find_model, load_tokenizer

pytestmark = pytest.mark.engine

PROJECT = Path(example.__file__).parent
NANO = find_model("gpt2-nano").folder
SIGNATURES = json.loads((Path(__file__).parent / "qefficient/signatures.json").read_text(encoding="utf-8"))
NAME = {"pretrained_model_name_or_path": NANO}
STATS = r"""
=+ Performance Stats =+
Average Prefill time a\.k\.a TTFT is= \d+\.\d+ sec
Decode is= \d+\.\d+ tokens/sec
Total is= \d+\.\d+ tokens/sec
Total \(E2E\) inference time is= \d+\.\d+ sec
=+
"""


def greedy(reference, ids, tokens):
    """transformers' choice for each of tokens, after those before it: equal to tokens if they are greedy."""
    with torch.no_grad():
        return reference(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1].argmax(-1).tolist()


def refused(capsys, *flags, model="gpt2-nano"):
    """The line of an error."""
    with pytest.raises(SystemExit) as caught:
        example.main([f"--model={model}", *flags])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1, error
    return error


# -- the class


def test_the_four_lines_work_without_an_export(tokenizer, nano_reference, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("QEFF_HOME", str(tmp_path))
    model = QEFFAutoModelForCausalLM.from_pretrained("gpt2-nano")
    model.compile(num_cores=16)
    info = model.generate(prompts=["Hi there!!"], tokenizer=tokenizer)
    ids = tokenizer("Hi there!!")["input_ids"]
    tokens = info.generated_ids[0][0, : 128 - len(ids) + 1].tolist()  # to the end of ctx_len's default
    assert tokens == greedy(nano_reference, ids, tokens)
    assert info.generated_texts == [[tokenizer.decode(tokens, clean_up_tokenization_spaces=False)]]
    printed = capsys.readouterr().out
    assert info.generated_texts[0][0] in printed and re.search(STATS, printed)
    assert "without effect here: num_cores=16" in printed
    again = QEFFAutoModelForCausalLM.from_pretrained("gpt2-nano")
    again.generate(tokenizer, ["Hi"], generation_len=3)  # compiles by the defaults
    assert again.qpc_path == model.qpc_path


def test_rows_of_a_batch_are_transformers_greedy_texts(nano, compiled, tokenizer, nano_reference):
    prompts = ["ROMEO:", "The assert statement is a convenient way to insert debugging ", "", "Hi"]
    model = compiled(nano, batch_size=4, prefill_seq_len=8, ctx_len=256)
    info = model.generate(tokenizer, prompts, generation_len=200, ignore_eos=True, return_logits=True)
    for row, prompt in enumerate(prompts):
        tokens = info.generated_ids[0][row, :200].tolist()
        assert tokens == greedy(nano_reference, tokenizer.encode(prompt) or [tokenizer.eos_token_id], tokens)
        assert np.argmax(info.logits[row], axis=1).tolist() == tokens
        assert info.generated_texts[0][row] == tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def test_batches_follow_qefficients_rule(nano, compiled, tokenizer, nano_reference, capsys):
    model = compiled(nano, batch_size=2)
    info = model.generate(tokenizer, ["A", "B", "C", "D", "E"], generation_len=4, ignore_eos=True)
    assert [len(texts) for texts in info.generated_texts] == [2, 2]
    for prompt, ids in zip("ABCD", np.concatenate(info.generated_ids), strict=True):
        tokens = ids[:4].tolist()
        assert tokens == greedy(nano_reference, tokenizer.encode(prompt), tokens)
    assert "the last 1 are dropped" in capsys.readouterr().out
    info = model.generate(tokenizer, ["A"], generation_len=4)
    assert info.generated_texts[0][0] == info.generated_texts[0][1]
    assert "are repeated" in capsys.readouterr().out


def test_both_kinds_of_tokenizer_give_the_same(nano, compiled, tokenizer):
    infos = [
        compiled(nano).generate(one, ["Grüße, 世界"], generation_len=40, sampler=Sampler(1.5, seed=1))
        for one in (tokenizer, load_tokenizer(NANO))
    ]
    assert infos[0].generated_texts == infos[1].generated_texts
    np.testing.assert_array_equal(infos[0].generated_ids, infos[1].generated_ids)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            "compile",
            {"ctx_len": 257},
            "ctx_len must be from prefill_seq_len (128) to the model's 256 positions, got 257",
        ),
        ("compile", {"ctx_len": 16, "prefill_seq_len": 17}, "ctx_len must be from prefill_seq_len (17)"),
        ("compile", {"num_cores": 0}, "num_cores must be a whole number of 1 or more, got 0"),
        ("compile", {"batch_size": "2"}, "batch_size must be a whole number of 1 or more, got '2'"),
        (
            "compile",
            {"full_batch_size": 4},
            "full_batch_size must be None without continuous_batching=True, got 4",
        ),
        ("compile", {"int8_matmul": True, "int4_matmul": True}, "int4_matmul must be False with int8_matmul, got True"),
        ("compile", {"onnx_path": "nowhere.onnx"}, "onnx_path must be a file, got nowhere.onnx"),
        ("generate", {"generation_len": 0}, "generation_len must be a whole number of 1 or more, got 0"),
        ("generate", {"prompts": []}, "prompts must be a text or a list of texts, got []"),
        ("generate", {"prompts": None}, "prompts must be a text or a list of texts, got None"),
        ("generate", {"prompts_txt_file_path": "nowhere"}, "prompts_txt_file_path must be a text file, got nowhere: "),
        ("generate", {"iteration": 0}, "iteration must be a whole number of 1 or more, got 0"),
        ("generate", {"draft_tokens": -1}, "draft_tokens must be a whole number of 0 or more, got -1"),
        ("generate", {"prompts": ["Z" * 129]}, "prompt must have at most ctx_len (128) tokens, got 129"),
        ("from_pretrained", {"dtype": "int8"}, "dtype must be float32 or float16, got 'int8'"),
    ],
)
def test_the_class_refuses_in_one_line(method, settings, message, tokenizer):
    needed = {"generate": {"tokenizer": tokenizer, "prompts": ["a"]}, "from_pretrained": NAME}.get(method, {})
    with pytest.raises(ValueError) as caught:
        getattr(QEFFAutoModelForCausalLM.from_pretrained(**NAME), method)(**needed | settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_are_quantized_from_float32(compiled, nano, bits):
    with pytest.raises(ValueError, match=f"dtype must be float32 with int{bits}_matmul, got float16"):
        compiled(nano, "float16", **{f"int{bits}_matmul": True})


# -- the statistics


def test_statistics_have_qefficients_words_and_the_rates_of_the_whole_batch():
    metrics = generation.PerfMetrics(prefill_time=0.5, decode_perf=19 / 2, total_perf=19 / 2.5, total_time=2.5)
    assert str(generation.ExecInfo(3, [], [], metrics)).splitlines() == [
        "Average Prefill time a.k.a TTFT is= 0.50 sec",
        "Decode is= 28.50 tokens/sec",
        "Total is= 22.80 tokens/sec",
        "Total (E2E) inference time is= 2.50 sec",
    ]


class Clock:
    """A session of two rows and a tokenizer: tokenizing and reading a prompt take 1 s and 2 s, a step of decode 2 s."""

    eot, ctx_len, vocab_size, batch_size, now = 1, 32, 5, 2, 0
    tokens_per_call = None

    def __init__(self, continuous=False):
        self.continuous, self.positions = continuous, np.zeros(2, int)

    def perf_counter(self):
        return self.now

    def encode(self, text):
        self.now += 1
        return [0] * len(text)

    def read(self, row, ids):
        self.now += 2
        return np.zeros((1, 5))

    def decode(self, tokens):
        self.now += 2
        return np.zeros((2, 5))

    def to_bytes(self, id):
        return b"a"


FOREVER = itertools.repeat([0, 0])
EARLY = [[0, 0], [0, 1], [0, 0]], itertools.repeat([1, 0])  # the second text ends after 2 tokens, the first after 4


@pytest.mark.parametrize(
    ("tokens", "count", "decoded"), [([FOREVER], 6, 5), ([FOREVER], 2, 1), ([FOREVER], 1, 0), (EARLY, 20, 3)]
)
def test_statistics_count_the_tokens_after_the_first_until_the_last_text_ends(monkeypatch, tokens, count, decoded):
    """The first token comes from prefill; both rates are QEfficient's, of one row."""
    clock, tokens = Clock(), itertools.chain(*tokens)
    monkeypatch.setattr(generation, "time", clock)
    options = generation.Options(count, lambda logits: np.array(next(tokens)), stream=False)
    info = generation.generate(clock, clock, ["abc", "abcdefg"], options)
    assert vars(info.perf_metrics) == {
        "prefill_time": 2 * 1 + 2 * 2,  # with tokenizing
        "decode_perf": decoded / (2 * decoded) if decoded else 0,
        "total_perf": decoded / (6 + 2 * decoded),
        "total_time": 6 + 2 * decoded,
    }


def test_statistics_of_continuous_batching_are_of_all_rows(monkeypatch):
    """Four texts in two rows: 5, 1, 2 and 3 tokens; the third follows the second, and the fourth the third."""
    clock, first = Clock(continuous=True), [0, 0, 0, 0, 1]
    tokens = zip(first, [1, 0, 1, 0, 0], strict=True)  # the last text ends with generation_len
    tokens = itertools.chain(tokens, [[0, 1]])
    monkeypatch.setattr(generation, "time", clock)
    options = generation.Options(None, lambda logits: np.array(next(tokens)), stream=False)
    info = generation.generate(clock, clock, ["a", "b", "c", "d"], options)
    assert [np.flatnonzero(row != 1).max(initial=-1) + 1 for row in info.generated_ids] == [4, 0, 1, 2]
    steps, decoded = 6, 4 + 0 + 1 + 2
    assert vars(info.perf_metrics) == {
        "prefill_time": (4 + 4 * 2) / 4,  # a text's; the last two are read between steps
        "decode_perf": decoded / (2 * (steps - 1)),
        "total_perf": decoded / (4 + 4 * 2 + 2 * (steps - 1)),
        "total_time": 4 + 4 * 2 + 2 * (steps - 1),
    }


# -- continuous batching


PROMPTS = ["ROMEO:", "The assert statement", "Hi", "JULIET: O Romeo, Romeo!", "", "To be, or not to be", "A list is"]


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_continuous_batching_gives_each_text_as_alone(nano, tokenizer, rows, capsys):
    """Of unequal lengths: each row takes the next prompt when its text ends."""
    model = QEFFAutoModelForCausalLM.from_pretrained(nano, continuous_batching=True)
    model.compile(full_batch_size=rows, ctx_len=64)
    info = model.generate(tokenizer, PROMPTS, return_logits=True)
    alone = QEFFAutoModelForCausalLM.from_pretrained(nano)
    alone.compile(ctx_len=64)
    expected = alone.generate(tokenizer, PROMPTS, return_logits=True)
    assert info.generated_texts[: len(PROMPTS)] == sum(expected.generated_texts, [])
    np.testing.assert_array_equal(info.generated_ids[: len(PROMPTS)], np.concatenate(expected.generated_ids))
    for own, other in zip(info.logits, expected.logits, strict=False):
        np.testing.assert_allclose(own, other, atol=1e-3)
    assert len({len(logits) for logits in expected.logits}) > 2  # texts of unequal lengths
    assert ("are repeated" in capsys.readouterr().out) == (rows > len(PROMPTS))


def test_the_artifact_of_continuous_batching_has_qefficients_sizes(nano):
    model = QEFFAutoModelForCausalLM.from_pretrained(nano, continuous_batching=True)
    with pytest.raises(ValueError, match="full_batch_size must be 1 or more with continuous_batching=True, got None"):
        model.compile()
    path = model.compile(full_batch_size=4, ctx_len=64, prefill_seq_len=16)
    shapes = json.loads((path.parent / "specializations.json").read_text(encoding="utf-8"))["specializations"]
    sizes = {"ctx_len": "64", "full_batch_size": "4"}
    assert [shape["symbols"] for shape in shapes] == [
        {"batch_size": "1", "seq_len": "16"} | sizes,
        {"batch_size": "4", "seq_len": "1"} | sizes,
    ]


# -- prompt-lookup decoding


@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(
    count=st.integers(1, 70), ids=st.lists(st.integers(0, 1400), min_size=1, max_size=30), repeat=st.integers(1, 3)
)
def test_drafts_change_no_token(count, ids, repeat):
    """Whatever they are; for texts to the end of the context, where a draft must end too."""
    model = shared_nano()
    ids = (ids * repeat)[:60]
    tokens = {}
    for session in model.session, Drafting(model.session, count):
        logits, tokens[session] = session.read(0, ids), []
        for _ in range(64 - len(ids)):
            tokens[session].append(logits.argmax())
            logits = session.decode(np.array([tokens[session][-1]]))
    plain, drafted = tokens.values()
    assert plain == drafted and session.tokens == len(plain) >= session.calls


@functools.cache
def shared_nano():
    model = QEFFAutoModelForCausalLM.from_pretrained(NANO)
    model.compile(ctx_len=64)
    return model


@pytest.mark.parametrize("sampler", [None, (0.9, 40, 0.9, 3)])
def test_drafts_give_the_same_text_in_fewer_calls(nano, compiled, tokenizer, sampler, capsys):
    model = compiled(nano, ctx_len=256)
    infos = [
        model.generate(
            tokenizer, "ROMEO:", ignore_eos=True, draft_tokens=count, sampler=Sampler(*sampler) if sampler else None
        )
        for count in (0, 4)
    ]
    assert infos[0].generated_texts == infos[1].generated_texts
    assert infos[0].tokens_per_call is None and infos[1].tokens_per_call > (1 if sampler else 1.3)
    assert f"Tokens per call of decode is= {infos[1].tokens_per_call:.2f}\n" in capsys.readouterr().out


def test_a_draft_is_what_followed_the_longest_earlier_match():
    assert look_up([1, 2, 3, 9, 8, 7, 5, 3, 6, 6, 1, 2, 3], 2) == [9, 8]
    assert look_up([4, 3, 9, 8, 7, 5, 3, 6, 6, 2, 3], 2) == [6, 6]  # of one token, the latest
    assert look_up([5, 5, 5, 5, 5], 3) == [5, 5]
    assert look_up([1, 2, 1, 2, 1, 2, 1, 2], 3) == [1, 2, 1]  # as many as wanted, rather than the latest
    assert look_up([1, 2, 3], 4) == look_up([1], 4) == look_up([7, 7], 0) == []


@pytest.mark.parametrize("settings", [{"batch_size": 2}, {"dtype": "float16"}, {"int8_matmul": True}])
def test_drafts_need_single_texts_in_float32(nano, compiled, tokenizer, settings):
    with pytest.raises(ValueError, match="draft_tokens must be 0 but for single texts in float32, got 4"):
        compiled(nano, **settings).generate(tokenizer, ["A", "B"], draft_tokens=4)


# -- QEfficient's keywords


@pytest.mark.parametrize(("method", "name"), [(method, name) for method, names in SIGNATURES.items() for name in names])
def test_each_keyword_of_qefficient_is_served_or_refused_by_name(nano, tokenizer, method, name):
    """SIGNATURES is read from its source. Refused: unless it has QEfficient's default."""
    function = getattr(QEFFAutoModelForCausalLM.from_pretrained(nano), method)
    if name in inspect.signature(function).parameters or method == "compile" and name in keywords.COMPILER_FLAGS:
        return
    assert name in keywords.REFUSED[method], f"{method}: neither served nor refused"
    default = ast.literal_eval(SIGNATURES[method][name])
    given = {"from_pretrained": NAME, "generate": {"tokenizer": tokenizer, "prompts": ["a"]}}.get(method, {})
    with pytest.raises(ValueError, match=rf"^{name} must be .* on a CPU, got 'another': .+"):
        function(**given, **{name: "another"})
    assert keywords.REFUSED[method][name][0] == default
    if method == "export":
        function(**{name: default})


@pytest.mark.parametrize(
    ("method", "name", "message"),
    [
        ("compile", "ctxlen", "compile has no keyword ctxlen; did you mean ctx_len?"),
        ("compile", "aic_enable_depth_frist", "did you mean aic_enable_depth_first?"),
        ("generate", "max_new_tokens", "generate has no keyword max_new_tokens"),
        ("export", "dir", "export has no keyword dir"),
    ],
)
def test_an_unknown_keyword_is_an_error(nano, tokenizer, method, name, message):
    given = {"tokenizer": tokenizer, "prompts": ["a"]} if method == "generate" else {}
    with pytest.raises(TypeError, match=re.escape(message)):
        getattr(QEFFAutoModelForCausalLM.from_pretrained(nano), method)(**given, **{name: 64})


def test_the_flags_of_the_compiler_are_recorded_and_printed(nano, capsys):
    model = QEFFAutoModelForCausalLM.from_pretrained(nano)
    path = model.compile(mos=2, aic_hw_version="ai200", ctx_len=64)
    assert "mos=2, aic_hw_version=ai200" in capsys.readouterr().out
    record = json.loads((path.parent / "compile.json").read_text(encoding="utf-8"))["for_the_card"]
    assert record["mos"] == 2 and path.name == "qpc"


def test_prompts_are_a_text_a_list_or_a_file(nano, compiled, tokenizer, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("ROMEO:\n Hi \n", encoding="utf-8")
    ways = [("ROMEO:", None), (["ROMEO:", "Hi"], None), (None, tmp_path / "prompts.txt")]
    infos = [
        compiled(nano).generate(tokenizer, prompts, prompts_txt_file_path=path, generation_len=5, stream=False)
        for prompts, path in ways
    ]
    assert infos[0].generated_texts == infos[1].generated_texts[:1]
    assert infos[1].generated_texts == infos[2].generated_texts and len(infos[1].generated_texts) == 2
    assert repr(infos[0]) in capsys.readouterr().out


def test_iteration_and_automation_print_as_qefficient(nano, compiled, tokenizer, capsys):
    compiled(nano).generate(tokenizer, ["Hi"], generation_len=3, stream=False, iteration=3)
    assert capsys.readouterr().out.count("Performance Stats") == 3
    info = compiled(nano).generate(tokenizer, ["Hi"], generation_len=3, stream=False, automation=True)
    assert capsys.readouterr().out == f"input= ['Hi']\noutput= {info.generated_texts}\n{info}\n"


def test_a_model_of_characters_without_an_end(make_checkpoint, capsys, tmp_path):
    """An empty prompt is one line, and --dump is an array that np.load reads."""
    folder = make_checkpoint(vocab_size=26, n_layer=1)
    (folder / "meta.json").write_text(json.dumps({"chars": "abcdefghijklmnopqrstuvwxyz"}), encoding="utf-8")
    assert "prompt must not be empty: this model has no <|endoftext|>" in refused(capsys, "--prompt=", model=folder)
    example.main([f"--model={folder}", "--prompt=abc", "--max-new-tokens=5", f"--dump={tmp_path / 'd.npz'}"])
    saved = np.load(tmp_path / "d.npz")
    assert saved["prompt_ids"].tolist() == [0, 1, 2] and saved["tokens"].shape == (5,)


# -- example.py


def test_example_without_arguments_runs_the_default_model():
    command = [sys.executable, "qaic_gpt2/example.py"]
    result = subprocess.run(command, cwd=PROJECT.parent, capture_output=True, encoding="utf-8", timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    first, *_ = result.stdout.splitlines()
    assert re.match(r"gpt2\S* \(\d+\.\dM parameters\) on cpu: onnxruntime [\d.]+, no Cloud AI 100 found", first)
    if first.startswith("gpt2-nano"):
        assert first.endswith("; gpt2 is not in the local cache and HF_HUB_OFFLINE is set")
    assert "\nHi there!!" in result.stdout and re.search(STATS, result.stdout)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
def test_the_dump_holds_what_was_printed(tmp_path, dtype, capsys):
    dump = tmp_path / "d.npz"
    flags = ["--model=gpt2-nano", "--max_new_tokens=150", "--ignore-eos", f"--precision={dtype}", f"--dump={dump}"]
    example.main([*flags, "--prompt=ROMEO:", "--prompt=JULIET: O"])
    printed = capsys.readouterr().out
    bpe, saved = load_tokenizer(NANO), np.load(dump)
    assert saved["prompt_ids"].tolist() == bpe.encode("ROMEO:")
    assert saved["tokens"].shape == (150,) and saved["logits"].shape == (150, bpe.n_vocab)
    assert saved["logits"].dtype == np.float32
    assert saved["logits"].argmax(axis=1).tolist() == saved["tokens"].tolist()
    assert "\n\nROMEO:" + bpe.decode(saved["tokens"].tolist()) + "\n" in printed
    assert "-" * 15 + "\nJULIET: O" in printed
    if dtype != "float16" or platform.machine() == "x86_64":  # Arm may have the kernels
        assert ("float16 computed in float32" in printed) == (dtype == "float16")
    assert [*tmp_path.iterdir()] == [dump]


def test_the_flags_reach_the_sampler(tmp_path):
    dump = tmp_path / "d.npz"
    flags = ["--temperature=1.5", "--top_k=40", "--top-p=0.7", "--seed=3", "--ignore-eos", "--max-new-tokens=40"]
    example.main(["--model=gpt2-nano", f"--dump={dump}", *flags])
    saved, sampler = np.load(dump), Sampler(1.5, 40, 0.7, 3)
    assert saved["tokens"].tolist() == [sampler(row) for row in saved["logits"]]


def test_a_text_ends_with_the_context_and_a_line_says_so(capsys):
    example.main(["--model=gpt2-nano", "--max-new-tokens=500", "--ignore-eos"])
    assert "(the end of the context: 256 tokens)" in capsys.readouterr().out


def test_end_of_text_ends_a_text_unless_ignored(tmp_path, capsys):
    """A model that always predicts <|endoftext|>: no other embedding differs from zero."""
    folder = shutil.copytree(NANO, tmp_path / "model")
    model = transformers.GPT2LMHeadModel.from_pretrained(NANO, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.bias += 1
        model.transformer.wte.weight[1407] = 1
    model.save_pretrained(folder)
    for more, count, text in ([], 1, ""), (["--ignore-eos"], 9, "<|endoftext|>" * 9):
        example.main([f"--model={folder}", "--max-new-tokens=9", f"--dump={tmp_path / 'd.npz'}", *more])
        assert f"\n\nHi there!!{text}\n\n===" in capsys.readouterr().out
        assert np.load(tmp_path / "d.npz")["tokens"].tolist() == [1407] * count


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature=-1"], "temperature must be"),
        (["--max-new-tokens=0"], "--max-new-tokens must be 1 or more, got 0"),
        (["--max-new-tokens=x"], "argument --max-new-tokens: invalid int value: 'x'"),
        (["--prefill-seq-len=-1"], "--prefill-seq-len must be 1 or more, got -1"),
        (["--ctx-len=300"], "ctx_len must be from prefill_seq_len (128) to the model's 256 positions, got 300"),
        (["--prompt=" + "Z" * 257], "prompt must have at most ctx_len (256) tokens, got 257"),
        (["--model=nowhere"], "'nowhere'"),
        (["--dtype=bfloat16"], "argument --dtype/--precision: invalid choice: 'bfloat16'"),
        (["--device=tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--device=qaic"], "--device must be auto or cpu here, got qaic: QEfficient is not installed: pip install"),
        (["--dump=nowhere/d.npz"], "--dump must be a file in an existing folder, got nowhere/d.npz"),
        (["--draft-tokens=-1"], "--draft-tokens must be 0 or more, got -1"),
        (["--draft-tokens=4", "--dtype=int8"], "--draft-tokens must be 0 but for a single text in float32, got 4"),
        (["--full-batch-size=0"], "--full-batch-size must be 1 or more, got 0"),
        (["--full-batch-size=2", "--verify"], "--full-batch-size must not be set with --verify, got 2"),
        (["--device-group=0"], "--device-group must not be set on a CPU: it names cards"),
        (["--device-group=x"], "argument --device-group: invalid device_ids value: 'x'"),
        (["--include-sampler"], "--include-sampler must not be set on a CPU: a CPU samples without it"),
        (["--prompt=--"], "-- must not be the value of a flag"),
        (["--dump=/tmp"], "--dump must be a file in an existing folder, got /tmp"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, message, capsys):
    assert message in refused(capsys, *flags)


@pytest.mark.parametrize(
    ("n_embd", "message"),
    [
        (24, "n_embd must be a multiple of 16 with int8, got 24"),
        (16, "n_embd / n_head must be a multiple of 8 with int8, got 16 and 4"),
    ],
)
def test_int8_of_a_width_without_blocks_is_one_line(make_checkpoint, capsys, n_embd, message):
    folder = make_checkpoint(n_layer=1, n_embd=n_embd)
    shutil.copy(NANO / "vocab.json", folder)
    shutil.copy(NANO / "merges.txt", folder)
    with pytest.raises(ValueError, match=message):
        QEFFAutoModelForCausalLM.from_pretrained(folder).compile(int8_matmul=True)
    assert message in refused(capsys, "--dtype=int8", "--prompt=0", model=folder)


def test_a_disk_error_or_a_changed_artifact_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    (tmp_path / "home").write_text("", encoding="utf-8")
    assert str(tmp_path / "home") in refused(capsys)
    (tmp_path / "home").unlink()
    example.main(["--model=gpt2-nano", "--max-new-tokens=1"])
    for name in "program.onnx", "model.onnx.data":
        [path] = (tmp_path / "home").rglob(name)
        path.write_bytes(path.read_bytes()[:-1])
        assert f"{path.name}: SHA-256 does not match" in refused(capsys)


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_a_bug_in_the_model_keeps_its_traceback(error, tmp_path, monkeypatch):
    monkeypatch.setenv("QEFF_HOME", str(tmp_path))

    def forward(self, x):
        raise error("shapes do not broadcast")

    monkeypatch.setattr(model.MLP, "forward", forward)
    with pytest.raises(error, match="broadcast"):
        example.main(["--model=gpt2-nano"])


# -- --verify


@pytest.mark.parametrize("dtype", example.LIMITS)
@pytest.mark.parametrize(("times", "status"), [(0, 0), (0.99, 0), (1.01, 1), (-1.01, 1), (np.nan, 1), (np.inf, 1)])
def test_verify_returns_1_beyond_its_limit(dtype, times, status, capsys):
    limit = {"float32": 1e-3, "float16": 1e-2, "int8": 5e-2, "int4": 3e-1}[dtype]
    expected = np.array([[1.0, -4, 2]])
    exact, model = (
        types.SimpleNamespace(session=types.SimpleNamespace(prefill=lambda rows, logits=logits: logits))
        for logits in (expected, expected + np.array([[0, 0, 4 * times * limit]]))  # 4: the largest
    )
    args = types.SimpleNamespace(dtype=dtype, device_group=None)
    assert example.verify(args, "cpu", model, exact, [[1, 2]]) == status
    assert ("NOT as expected" if status else ": as expected") in capsys.readouterr().out


@pytest.mark.parametrize(("factor", "status"), [(1, 0), (1.2, 1)])
def test_verify_finds_wrong_scales(factor, status, tmp_path, monkeypatch, capsys):
    blocks = fusion.blocks
    monkeypatch.setattr(fusion, "blocks", lambda *given: (blocks(*given)[0], blocks(*given)[1] * np.float32(factor)))
    monkeypatch.setenv("QEFF_HOME", str(tmp_path))
    assert example.main(["--model=gpt2-nano", "--verify", "--dtype=int8"]) == status
    assert "as expected (up to 0.05)" in capsys.readouterr().out


def printed(notebook):
    """What each cell prints; and that it is neither an error nor a warning."""
    texts = {}
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        assert not [out for out in outputs if out["output_type"] == "error" or out.get("name") == "stderr"]
        texts[cell.id] = re.sub(r"\d+\.[\d.]+", "N", "".join(out.get("text", "") for out in outputs))
    assert "on cpu: onnxruntime N" in texts["cell-2"] and "Decode is= N tokens/sec" in texts["cell-10"]
    assert any("image/png" in out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", []))
    return texts


def test_the_notebook_prints_what_it_holds(monkeypatch):
    """But for times and versions, and int8, whose text depends on the CPU; with the model in the repository."""
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", "nowhere")
    held = nbformat.read(PROJECT / "QEfficientGPT2.ipynb", as_version=4)
    nbformat.validate(held)
    notebook = copy.deepcopy(held)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": PROJECT}}).execute()
    texts, expected = printed(notebook), printed(held)
    del texts["cell-int8-code"], expected["cell-int8-code"]
    assert texts == expected
