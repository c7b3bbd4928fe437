"""From a module to a graph: traced, saved with a description of what it was traced from, loaded while that matches.

The backends have the same methods: `Neuron` for a NeuronCore, `CPU` for any machine, and `XLA`, the front end of the
first on the second.
"""

import hashlib
import io
import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn as nn

from neuron_nanogpt import graphs, kernels, model
from neuron_nanogpt.cpu import CPU
from neuron_nanogpt.files import write_files
from neuron_nanogpt.neuron import Neuron, version
from neuron_nanogpt.xla import XLA

DTYPES = ("float32", "bfloat16", "int8")
DEVICES = ("auto", "cpu", "xla", "neuron")
OPTIONS = {"cpu": (), "xla": ("dump_hlo",), "neuron": ("target", "compiler_args", "cores", "states", "compile_only")}
INSTALL = {
    "neuron": "on a Neuron instance: pip install -r requirements.txt",
    "xla": "pip install -r requirements-xla.txt",
}
DRIVER = Path("/dev/neuron0")
INDEX = "https://pip.repos.neuron.amazonaws.com"


class ArtifactError(OSError):
    """A graph on disk that must not be loaded."""


def choose(device: str = "auto", **options) -> CPU | Neuron | XLA:
    """The backend for --device; auto is a NeuronCore if there is one. The options are those of the backends."""
    missing = {"neuron": why_no_neuron(driver=not options.get("compile_only")), "xla": why_no_xla()}
    if device not in DEVICES:
        raise ValueError(f"--device must be {', '.join(DEVICES[:-1])} or {DEVICES[-1]}, got {device}")
    if missing.get(device):
        raise ValueError(f"--device must be auto or cpu, got {device}: {missing[device]} ({INSTALL[device]})")
    if device == "auto":
        device = "cpu" if missing["neuron"] else "neuron"
    for name, value in options.items():
        if name not in OPTIONS[device] and value not in (None, False, (), 1):
            value = " ".join(value) if isinstance(value, tuple) else value
            raise ValueError(f"--{name.replace('_', '-')} must not be given with the device {device}, got {value}")
    options = {name: value for name, value in options.items() if name in OPTIONS[device] and value is not None}
    if device == "cpu":
        return CPU(missing["neuron"], "cpu" if why_no_neuron(driver=False) is None else "neuron")
    return {"neuron": Neuron, "xla": XLA}[device](**options)


def why_no_neuron(driver: bool = True) -> str | None:
    if find_spec("torch_neuronx") is None:
        return "torch-neuronx is not installed"
    if (found := version("torch-neuronx") or "").partition(".post")[0] == "1.0":
        return f"torch-neuronx {found} is PyPI's empty placeholder: the package is at {INDEX}"
    return None if DRIVER.exists() or not driver else f"{DRIVER} is missing"


def why_no_xla() -> str | None:
    return None if find_spec("torch_xla") else "torch_xla is not installed"


class Compiler:
    """The graphs of one checkpoint, by one backend, kept in the current directory if the backend saves them."""

    def __init__(self, backend, folder, dtype, recompile=False):
        self.backend, self.dtype, self.recompile = backend, dtype, recompile
        self.facts = backend.facts | backend.weights_facts(folder) | {"dtype": dtype, "code": hash_code()}

    def describe(self):
        return self.backend.describe(self.dtype)

    def prepare(self, gpt):
        """Converts a model in place, which spares the memory of a second one."""
        return self.backend.prepare(gpt, self.dtype)

    def build(self, module: nn.Module, inputs: tuple, kind: str) -> Callable | None:
        """The module's graph: compiled now, or reused from its file, or traced and saved there."""
        start, name, why = time.perf_counter(), self.name(kind, len(inputs[0])), ""
        if self.backend.saves:
            name += f"_{self.backend.label}.pt"
            data, verb, why = self.find_or_trace(module, inputs, Path(name))
            graph = None if self.backend.compile_only else self.load(data, module)
        else:
            graph, verb = self.backend.compile(module, inputs, name), "compiled"
        seconds = time.perf_counter() - start
        print(f"{name}: {verb} in {seconds:.1f} s" + (f" ({why})" if why else ""), flush=True)
        return graph

    def load(self, data: bytes, module: nn.Module) -> Callable:
        with self.backend.loading():
            graph = torch.jit.load(io.BytesIO(data))
        return self.backend.attach(graph, module)

    def name(self, kind: str, batch: int) -> str:
        """gpt2_step, or with what is not the default: gpt2_step_b4_int8."""
        parts = [f"b{batch}"] if batch > 1 else []
        parts += [self.dtype] if self.dtype != self.backend.dtypes[0] else []
        return "_".join(["gpt2", kind, *parts])

    def find_or_trace(self, module: nn.Module, inputs: tuple, path: Path) -> tuple[bytes, str, str]:
        """(the artifact's bytes, reused or traced, why)"""
        wanted = self.facts | {"graph": type(module).__name__, "slots": module.slots}
        wanted |= {"inputs": [[list(tensor.shape), str(tensor.dtype)] for tensor in inputs]}
        data, why = (None, "--recompile") if self.recompile else find_artifact(path, wanted)
        if data:
            return data, "reused", ""
        file = io.BytesIO()
        torch.jit.save(self.backend.trace(module, inputs), file)
        save_artifact(path, file.getvalue(), wanted)
        return file.getvalue(), "traced", why


def find_artifact(path, wanted):
    """(the artifact's bytes or None, why not): its description must match what is wanted."""
    if not path.exists():
        return None, ""
    data, given = read_artifact(path)
    for key, value in wanted.items():
        if given.get(key) != value:
            hidden = key in ("weights", "config", "code")
            return None, f"{key} changed" if hidden else f"{key} was {given.get(key)}, is {value}"
    return data, ""


def read_artifact(path):
    """(bytes, description) of an artifact whose SHA-256 matches its JSON: a graph is a program that may do anything."""
    sidecar, advice = path.with_suffix(".json"), "delete it or use --recompile"
    for pause in (0.1, 0.2, 0.4, 0):  # another run may be replacing the two files
        data = path.read_bytes()
        try:
            given = json.loads(sidecar.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            problem = f"{path} needs a readable {sidecar.name} ({error}): {advice}"
        else:
            if isinstance(given, dict) and given.get("sha256") == hashlib.sha256(data).hexdigest():
                return data, given
            problem = f"{path} has a SHA-256 that does not match {sidecar.name}: {advice}"
        time.sleep(pause)
    raise ArtifactError(problem)


def save_artifact(path, data, description):
    description = {"sha256": hashlib.sha256(data).hexdigest()} | description
    text = json.dumps(description, indent=2) + "\n"
    write_files(
        {
            path: lambda temporary: temporary.write_bytes(data),
            path.with_suffix(".json"): lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"),
        }
    )


def hash_code():
    """SHA-256 of the source that a graph's operations come from."""
    sources = [Path(module.__file__).read_bytes() for module in (graphs, kernels, model)]
    return hashlib.sha256(b"".join(sources)).hexdigest()
