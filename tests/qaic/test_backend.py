"""The path of a card, with a stand-in for QEfficient that enforces the signatures of 1.23 (commit ebf55e8159c8)."""

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


class Model:
    """QEfficient.QEFFAutoModelForCausalLM with its signatures and its demands; it compiles nothing."""

    calls = []

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, continuous_batching=False, qaic_config=None, **kwargs):
        assert isinstance(pretrained_model_name_or_path, str)
        assert set(kwargs) <= {"torch_dtype"} and all(isinstance(value, torch.dtype) for value in kwargs.values())
        model = cls()
        model.folder, model.onnx_path, model.qpc_path = pretrained_model_name_or_path, None, None
        cls.calls.append(("from_pretrained", kwargs))
        return model

    def export(self, export_dir=None, **kwargs):
        assert not kwargs
        self.onnx_path = Path("model.onnx")
        self.calls.append(("export", {}))
        return self.onnx_path

    def compile(
        self,
        onnx_path=None,
        compile_dir=None,
        *,
        prefill_seq_len=32,
        ctx_len=128,
        batch_size=1,
        num_devices=1,
        num_cores=16,
        mxfp6_matmul=False,
        mxint8_kv_cache=False,
    ):  # QEfficient turns any other keyword into a flag of its compiler, which has no int8-matmul
        sizes = {"prefill_seq_len": prefill_seq_len, "ctx_len": ctx_len, "batch_size": batch_size}
        assert all(type(size) is int for size in sizes.values())
        self.calls.append(("compile", {**sizes, "num_cores": num_cores, "mxfp6_matmul": mxfp6_matmul}))
        Session.compiled = self.folder, sizes
        self.qpc_path = Path("qpc")
        return self.qpc_path

    def generate(self, tokenizer, prompts, device_id=None, runtime_ai100=True, **kwargs):
        if not isinstance(self.qpc_path, Path):
            raise TypeError("Please run compile API first!")
        assert set(kwargs) <= {"generation_len", "automation", "iteration", "write_io"}
        assert all(isinstance(prompt, str) and prompt for prompt in prompts)
        tokenizer(prompts, return_tensors="np", padding=False)  # a tokenizer of Hugging Face's
        self.calls.append(("generate", kwargs))
        print(" a text", end="")
        return types.SimpleNamespace(generated_texts=[[" a text"] * len(prompts)], generated_ids=[np.zeros((1, 9))])


class Session:
    """QEfficient.generation.cloud_infer.QAICInferenceSession: buffers must be skipped and set before a run.

    Its logits are transformers', after each row's largest position of all that the session has read.
    """

    compiled = None
    off_by = 0  # positions: the fault of a wrong card

    def __init__(self, qpc_path, device_ids=None, activate=True, enable_debug_logs=False):
        folder, sizes = self.compiled
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
    Model.calls = []
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
    assert Model.calls == [
        ("from_pretrained", {"torch_dtype": torch.float32}),
        ("export", {}),
        (
            "compile",
            {"prefill_seq_len": 32, "ctx_len": 128, "batch_size": 2, "num_cores": 16, "mxfp6_matmul": True},
        ),
        ("generate", {"generation_len": 9}),
    ]
    assert "\nHi a text" in printed.out and "-" * 15 + "\n a text" in printed.out


def test_no_card_is_used_if_the_cpu_is_requested(sdk, capsys):
    status, printed = run(capsys, "--device=cpu", "--max-new-tokens=3")
    assert status == 0 and "on cpu: onnxruntime" in printed.out and Model.calls == []


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--dump=d.npz", "--dump must not be set on a card: QEfficient is greedy, and returns no logits"),
        ("--temperature=0.5", "--temperature must not be set on a card"),
        ("--ignore-eos", "--ignore-eos must not be set on a card"),
        ("--dtype=int8", "--dtype must be float32 or float16 on a card, got int8"),
    ],
)
def test_flags_that_qefficient_lacks_are_refused(sdk, capsys, flag, message):
    status, printed = run(capsys, flag)
    assert status == 2 and message in printed.err and printed.err.count("\n") == 1 and Model.calls == []


def test_generation_ends_with_the_context_on_a_card_too(sdk, capsys):
    """QEfficient itself would continue, with a warning."""
    status, _ = run(capsys, "--prompt=Hi", "--max-new-tokens=100", "--ctx-len=64")
    assert status == 0 and Model.calls[-1][1]["generation_len"] < 64


@pytest.mark.parametrize("name", ["compile", "generate"])
def test_an_error_of_qefficient_is_one_line(sdk, monkeypatch, capsys, name):
    def fails(self, **settings):
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
