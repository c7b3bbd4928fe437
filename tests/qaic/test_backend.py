"""The path of a card, with a stand-in for QEfficient that enforces the signatures of 1.23 (commit ebf55e8159c8)."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from qaic_gpt2 import auto_model, backend, example

LISTED = "QID 0\n\tStatus:Ready\n"


# what QEfficient's methods take: qefficient/recipe.py reads it from its source
SIGNATURES = json.loads((Path(__file__).parent / "qefficient/signatures.json").read_text(encoding="utf-8"))
HF_KEYWORDS = {"torch_dtype", "dtype"}  # transformers' from_pretrained takes these


class Model:
    """QEfficient.QEFFAutoModelForCausalLM with its signatures, its demands and its output; it compiles nothing."""

    calls = []

    @classmethod
    def log(cls, method, keywords):
        more = HF_KEYWORDS if method == "from_pretrained" else set()
        assert {*keywords} <= {*SIGNATURES[method]} | more, method
        cls.calls.append((method, keywords))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **keywords):
        assert isinstance(pretrained_model_name_or_path, str)
        assert isinstance(keywords["torch_dtype"], torch.dtype)
        cls.log("from_pretrained", keywords)
        model = cls()
        model.folder, model.onnx_path, model.qpc_path = pretrained_model_name_or_path, None, None
        model.continuous = keywords.get("continuous_batching", False)
        model.sampler = (keywords.get("qaic_config") or {}).get("include_sampler", False)
        return model

    def export(self, export_dir=None, **keywords):
        self.log("export", keywords)
        self.onnx_path = Path("export-1/model.onnx")
        return self.onnx_path

    def compile(self, onnx_path=None, compile_dir=None, **keywords):
        """QEfficient turns keywords that are not in its signature into flags of its compiler: none is misspelled."""
        assert onnx_path == self.onnx_path  # QEfficient would export again: the name of the folder depends on settings
        self.log("compile", keywords)
        assert all(type(keywords[name]) is int for name in ("prefill_seq_len", "ctx_len", "batch_size"))
        assert self.continuous == ("full_batch_size" in keywords)
        self.batch_size = keywords["batch_size"]
        Session.compiled = self.folder, keywords
        self.qpc_path = Path("qpc")
        return self.qpc_path

    def generate(self, tokenizer, prompts, device_id=None, runtime_ai100=True, **keywords):
        if not isinstance(self.qpc_path, Path):
            raise TypeError("Please run compile API first!")
        self.log("generate", keywords | {"device_id": device_id})
        assert all(isinstance(prompt, str) and prompt for prompt in prompts)
        assert self.sampler == keywords.get("include_sampler", False)
        tokenizer(prompts, return_tensors="np", padding=False)  # a tokenizer of Hugging Face's
        texts, ids = [" a text"] * len(prompts), np.zeros((len(prompts), 9))
        stream = keywords.get("stream", True) or self.continuous  # which does not pass stream on
        if stream and not self.continuous:  # without the last token
            print(f"\nPrompt : {prompts[0]}\nCompletion :{prompts[0]} a", end="")
        for prompt, text in [*zip(prompts, texts, strict=True)][0 if self.continuous else 1 :] if stream else []:
            print(f"\n{'-' * 20}\n\nPrompt :  {prompt}\nCompletion :  {text}")
        print("\n=== Performance Stats ===")
        if self.continuous:
            return types.SimpleNamespace(batch_size=1, generated_texts=texts, generated_ids=ids)
        return types.SimpleNamespace(batch_size=self.batch_size, generated_texts=[texts], generated_ids=[ids])


class Session:
    """QEfficient.generation.cloud_infer.QAICInferenceSession: buffers must be skipped and set before a run.

    Its logits are transformers', after each row's largest position of all that the session has read.
    """

    compiled = None
    off_by = 0  # positions: the fault of a wrong card
    devices = []  # of each session

    def __init__(self, qpc_path, device_ids=None, activate=True, enable_debug_logs=False):
        folder, sizes = self.compiled
        self.devices.append(device_ids)
        self.model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
        config, batch = self.model.config, sizes["batch_size"]
        self.read = np.full((batch, sizes["ctx_len"]), -1)  # ids
        caches = [f"past_{kind}.{layer}" for layer in range(config.n_layer) for kind in ("key", "value")]
        self.input_names = ["input_ids", "position_ids", *caches]
        self.output_names = ["logits", *(f"{name}_RetainedState" for name in caches)]
        names = [*self.input_names, *self.output_names]
        self.binding_index_map = {name: place for place, name in enumerate(names)}
        self.allowed_shapes = []
        for length in (sizes["prefill_seq_len"], 1):
            dims = {name: [batch, length] for name in ("input_ids", "position_ids")}
            dims["logits"] = [batch, 1, config.vocab_size]
            self.allowed_shapes.append([(4, dims.get(name, [1])) for name in names])
        self.skipped, self.buffers = set(), {}

    def skip_buffers(self, names):
        self.skipped |= set(names)

    def set_buffers(self, buffers):
        self.buffers |= buffers

    def run(self, inputs):
        assert self.skipped == {name for name in self.binding_index_map if name.startswith("past_")}
        assert {*inputs} == {"input_ids", "position_ids"}
        ids, positions = inputs["input_ids"], inputs["position_ids"]
        assert ids.shape == positions.shape in [tuple(shapes[0][1]) for shapes in self.allowed_shapes]
        logits = self.buffers["logits"]
        assert logits.dtype == np.float32
        for row, places in enumerate(positions):
            self.read[row, places[places >= 0]] = ids[row, places >= 0]
            if (places < 0).any():
                self.read[row, -1] = 0  # padding, as model.py writes it
            last, logits[row] = places.max(), 0
            if last >= 0:
                text = self.read[row, : last + 1]
                assert (text >= 0).all()  # no position before the last was left out
                with torch.no_grad():
                    logits[row, 0] = self.model(torch.tensor(text[None])).logits[0, max(last - self.off_by, 0)]
        return {"logits": logits}


@pytest.fixture
def sdk(tmp_path, monkeypatch):
    """All that this project looks for on a machine with the SDK, QEfficient and a card."""
    for name in ("exec/qaic-compile", f"dev/lib/{backend.platform.machine()}/qaicrt.so"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    (tmp_path / "tools").mkdir()
    util = tmp_path / "tools/qaic-util"
    util.write_text(f"#!/bin/sh\ntest \"$1\" = -q && printf '{LISTED}'\n", encoding="utf-8")
    util.chmod(0o755)
    monkeypatch.setattr(backend, "SDK", tmp_path)
    names = {
        "QEfficient": {"QEFFAutoModelForCausalLM": Model, "__version__": "1.23.0.dev0", "__path__": []},
        "QEfficient.generation": {"__path__": []},
        "QEfficient.generation.cloud_infer": {"QAICInferenceSession": Session},
    }
    for name, content in names.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        module.__spec__ = types.SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, module)
    Model.calls, Session.devices = [], []
    monkeypatch.setattr(Session, "off_by", 0)
    return tmp_path


def run(capsys, *flags):
    try:
        status = example.main(["--model=gpt2-nano", *flags])
    except SystemExit as exit:
        status = exit.code
    return status or 0, capsys.readouterr()


def test_qefficient_runs_if_a_card_is_ready(sdk, capsys):
    assert backend.choose() is backend.QEFFAutoModelForCausalLM is Model
    status, printed = run(capsys, "--prompt=Hi", "--prompt=", "--max-new-tokens=9", "--mxfp6-matmul")
    assert status == 0, printed.err
    assert printed.out.startswith("gpt2-nano (3.6M parameters) on qaic: QEfficient 1.23.0.dev0\n")
    sizes = {"prefill_seq_len": 32, "ctx_len": 128, "batch_size": 2}
    assert Model.calls == [
        ("from_pretrained", {"torch_dtype": torch.float32}),
        ("export", {}),
        ("compile", {**sizes, "num_cores": 16, "num_devices": 1, "mxfp6_matmul": True}),
        ("generate", {"generation_len": 9, "stream": False, "device_id": None}),
    ]
    assert printed.out.count("Hi a text\n") == 1 and printed.out.count("<|endoftext|> a text\n") == 0
    assert printed.out.count(" a text") == 2 and "Completion" not in printed.out


def test_the_settings_of_cards_reach_qefficient(sdk, capsys):
    flags = ["--device-group=[0,1]", "--mos=2", "--aic-enable-depth-first", "--mxint8-kv-cache"]
    status, printed = run(capsys, *flags, "--aic-hw-version=ai200", "--verify")
    assert status == 0, printed.err
    compiled = dict(Model.calls)["compile"]
    assert compiled.items() >= {"num_devices": 2, "mos": 2, "aic_enable_depth_first": True}.items()
    assert compiled.items() >= {"mxint8_kv_cache": True, "aic_hw_version": "ai200"}.items()
    assert Session.devices == [[0, 1]]
    run(capsys, "--device-group=1", "--max-new-tokens=2")
    assert Model.calls[-1][1]["device_id"] == [1]


def test_continuous_batching_runs_on_the_card(sdk, capsys):
    status, printed = run(capsys, "--prompt=A", "--prompt=B", "--prompt=C", "--full-batch-size=2", "--max-new-tokens=4")
    assert status == 0, printed.err
    calls = dict(Model.calls)
    assert calls["from_pretrained"]["continuous_batching"] is True
    assert (calls["compile"]["batch_size"], calls["compile"]["full_batch_size"]) == (1, 2)
    assert [printed.out.count(f"Prompt :  {prompt}\n") for prompt in "ABC"] == [1, 1, 1]
    assert printed.out.count(" a text") == 3  # QEfficient's own lines


def test_the_card_samples(sdk, capsys):
    """QEfficient's sampler takes a row of parameters for each text, and one random number for each candidate."""
    flags = ["--include-sampler", "--temperature=0.8", "--top-k=20", "--top-p=0.9", "--prompt=A", "--prompt=B"]
    for seed in 1, 1, 2:
        status, printed = run(capsys, *flags, f"--seed={seed}")
        assert status == 0, printed.err
    config = dict(Model.calls)["from_pretrained"]["qaic_config"]
    assert config == {"include_sampler": True, "max_top_k_ids": 512}
    params = [keywords["sampling_params"] for method, keywords in Model.calls if method == "generate"]
    values = {name: array[:, 0].tolist() for name, array in params[0].items() if name != "random_numbers"}
    one = {"temperatures": 0.8, "top_ks": 20, "top_ps": 0.9, "min_ps": 0, "repetition_penalties": 1}
    assert values == {name: pytest.approx([value, value]) for name, value in (one | {"presence_penalties": 0}).items()}
    assert params[0]["top_ks"].dtype == np.int32 and params[0]["temperatures"].dtype == np.float32
    random = [each["random_numbers"] for each in params]
    assert random[0].shape == (2, 512) and ((random[0] >= 0) & (random[0] < 1)).all()
    np.testing.assert_array_equal(random[0], random[1])
    assert (random[0] != random[2]).any() and (random[0][0] != random[0][1]).any()


def test_a_host_with_the_compiler_alone_compiles(sdk, capsys):
    for name in (f"dev/lib/{backend.platform.machine()}/qaicrt.so", "tools/qaic-util"):
        (sdk / name).unlink()
    status, printed = run(capsys, "--compile-only", "--device=qaic")
    assert status == 0, printed.err
    assert [method for method, _ in Model.calls] == ["from_pretrained", "export", "compile"]
    status, printed = run(capsys, "--device=qaic")
    assert status == 2 and "has no qaicrt" in printed.err
    (sdk / "exec/qaic-compile").unlink()
    status, printed = run(capsys, "--compile-only", "--device=qaic")
    assert status == 2 and "qaic-compile is missing" in printed.err


def test_no_card_is_used_if_the_cpu_is_requested(sdk, capsys):
    status, printed = run(capsys, "--device=cpu", "--max-new-tokens=3")
    assert status == 0 and "on cpu: onnxruntime" in printed.out and Model.calls == []


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--dump=d.npz", "--dump must not be set on a card: QEfficient's generate returns no logits"),
        ("--temperature=0.5", "--temperature must not be set on a card without --include-sampler"),
        ("--ignore-eos", "--ignore-eos must not be set on a card"),
        ("--draft-tokens=4", "--draft-tokens must not be set on a card: QEfficient drafts with a second model"),
        ("--include-sampler --verify", "--include-sampler must not be set on a card with --verify"),
        ("--include-sampler --top-k=513", "--top-k must be at most 512 on a card, got 513"),
        ("--device-group=0,1 --num-devices=3", "--num-devices must be 2, the number of cards in --device-group, got 3"),
        ("--dtype=int8", "--dtype must be float32 or float16 on a card, got int8"),
    ],
)
def test_flags_that_qefficient_lacks_are_refused(sdk, capsys, flag, message):
    status, printed = run(capsys, *flag.split())
    assert status == 2 and message in printed.err and printed.err.count("\n") == 1 and Model.calls == []


def test_generation_ends_with_the_context_on_a_card_too(sdk, capsys):
    """QEfficient itself would continue, with a warning."""
    status, _ = run(capsys, "--prompt=Hi", "--max-new-tokens=100", "--ctx-len=64")
    assert status == 0 and Model.calls[-1][1]["generation_len"] < 64


@pytest.mark.parametrize("name", ["compile", "generate"])
def test_an_error_of_qefficient_is_one_line(sdk, monkeypatch, capsys, name):
    def fails(self, *args, **settings):
        raise RuntimeError("Compilation failed!\nCompiler exitcode: 1\nCompiler stderr:\nunsupported version")

    monkeypatch.setattr(Model, name, fails)
    status, printed = run(capsys)
    assert status == 2 and printed.err.count("\n") == 1
    assert "QEfficient: Compilation failed!" in printed.err and "unsupported version" in printed.err


@pytest.mark.parametrize(("off_by", "status"), [(0, 0), (1, 1)])
def test_verify_compares_the_cards_session_with_the_cpu(sdk, monkeypatch, capsys, off_by, status):
    """Prompts of several chunks and of unequal lengths, of which one fills the context."""
    monkeypatch.setattr(Session, "off_by", off_by)
    prompts = ["--prompt=" + "Hi there!! " * 8, "--prompt=ROMEO:", "--prompt=" + "To be, or not to be" * 3]
    ended, printed = run(capsys, "--verify", *prompts, "--prefill-seq-len=8", "--ctx-len=41")
    assert ended == status, printed.err
    assert ("NOT as expected" if status else ": as expected") + " (up to 0.01)" in printed.out
    apart = float(re.search(r"within (\S+) of", printed.out)[1])
    assert apart < 1e-4 or status  # transformers' float32 and ours


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("QEfficient", "QEfficient is not installed: pip install -r requirements.txt"),
        ("exec/qaic-compile", "exec/qaic-compile is missing: install the Cloud AI Apps SDK, https://"),
        (f"dev/lib/{backend.platform.machine()}/qaicrt.so", "has no qaicrt: install the Cloud AI Platform SDK"),
        ("tools/qaic-util", "qaic-util -q fails (FileNotFoundError)"),
    ],
)
def test_a_missing_package_is_named_with_its_install_command(sdk, monkeypatch, capsys, gone, message):
    if gone == "QEfficient":
        monkeypatch.delitem(sys.modules, "QEfficient")
    else:
        (sdk / gone).unlink()
    status, printed = run(capsys, "--device=qaic")
    assert status == 2 and message in printed.err and printed.err.count("\n") == 1
    assert backend.choose() is auto_model.QEFFAutoModelForCausalLM


@pytest.mark.parametrize("script", ["exit 1", "echo Status:Error"])
def test_a_card_that_is_not_ready_is_refused(sdk, script):
    (sdk / "tools/qaic-util").write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="lists no card"):
        backend.choose("qaic")


def test_onnxruntime_reports_to_nobody(tmp_path):
    """Its telemetry begins with a file in the temporary folder."""
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(backend.__file__).parents[1])}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", "import qaic_gpt2.runtime"], env=environment, check=True)
    assert not [*tmp_path.iterdir()]
