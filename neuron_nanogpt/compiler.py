"""From a module to a graph: traced, saved with a description of what it was traced from, loaded while that matches.

Two backends have the same methods. `Neuron` is torch_neuronx.trace, for a NeuronCore. `CPU` is torch.jit.trace of the
same modules, for any machine.
"""

import hashlib
import importlib.metadata
import io
import json
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F

from neuron_nanogpt import graphs, kernels, model, weight_loader
from neuron_nanogpt.files import write_files

DTYPES = ("float32", "bfloat16", "int8")  # of the weights; int8 on the CPU alone
DEVICES = ("auto", "cpu", "neuron")
TARGETS = ("trn1", "trn2", "inf2")
DRIVER = Path("/dev/neuron0")
INDEX = "https://pip.repos.neuron.amazonaws.com"


class ArtifactError(OSError):
    """A graph on disk that must not be loaded."""


def choose(device="auto", target="trn1", compiler_args=(), cores=1, dtype="float32"):
    """The backend for --device; auto is a NeuronCore if there is one."""
    missing = why_no_neuron()
    if device not in DEVICES:
        raise ValueError(f"--device must be {', '.join(DEVICES[:-1])} or {DEVICES[-1]}, got {device}")
    if device == "neuron" and missing:
        install = "on a Neuron instance: pip install -r requirements.txt"
        raise ValueError(f"--device must be auto or cpu, got neuron: {missing} ({install})")
    if device == "neuron" or device == "auto" and not missing:
        if dtype == "int8":
            raise ValueError("--dtype must be float32 or bfloat16 on a NeuronCore, got int8: it is for the CPU here")
        return Neuron(target, compiler_args, cores)
    if cores > 1:
        raise ValueError(f"--cores must be 1 on the cpu, got {cores}")
    return CPU(missing)


def why_no_neuron():
    if find_spec("torch_neuronx") is None:
        return "torch-neuronx is not installed"
    try:
        from torch_neuronx import trace  # noqa: F401
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        return f"torch_neuronx cannot be imported ({reason}): PyPI has an empty placeholder, the package is at {INDEX}"
    return None if DRIVER.exists() else f"{DRIVER} is missing"


class CPU:
    name, target, cores = "cpu", None, 1
    software = f"TorchScript of torch {torch.__version__}"

    def __init__(self, missing=None):
        self.missing = missing  # why this is not a NeuronCore
        self.facts = {"device": "cpu", "fbgemm": kernels.FBGEMM, "versions": {"torch": torch.__version__}}

    def describe(self, dtype):
        parts = [f"cpu: {self.software}"] + ([self.missing] if self.missing else [])
        if dtype != "float32" and not kernels.FBGEMM:
            parts.append(f"{dtype} weights widened to float32, since this PyTorch lacks FBGEMM")
        return ", ".join(parts)

    def weights_facts(self, folder):
        """The graph takes the weights from the checkpoint at each start: it depends on the config alone."""
        return {"config": asdict(weight_loader.read_config(folder))}

    def prepare(self, gpt, dtype):
        return kernels.prepare(gpt, dtype)

    def trace(self, module, inputs):
        """The graph without its weights: they are the model's, and every graph shares them."""
        graph = torch.jit.trace(module, inputs, check_trace=False)
        for name, tensor in module.state_dict().items():
            set_attribute(graph, name, torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))  # one number on disk
        for name in kernels.packed(module):
            set_attribute(graph, name, kernels.pack_half(torch.zeros(1, 1)))
        return graph

    def load(self, file, module):
        """The graph, and its cache."""
        graph = torch.jit.load(file).eval()
        for name, value in (module.state_dict() | kernels.packed(module)).items():
            set_attribute(graph, name, value)
        return graph, list(module.cache)

    def fill(self, cache, new):
        """Copies keys or values into the cache: memory is taken for positions that are filled."""
        cache[:, :, : new.shape[2]].copy_(new)


class Neuron:
    name = "neuron"

    def __init__(self, target, compiler_args, cores):
        self.target, self.cores = target, cores
        # auto-cast would turn float32 products into bfloat16; GPT-2's masks overflow without the last
        fixed = [f"--target={target}", "--model-type=transformer", "--auto-cast=none", "--enable-saturate-infinity"]
        self.compiler_args = [*fixed, *compiler_args]
        versions = {name: version(name) for name in ("torch", "torch-neuronx", "neuronx-cc")}
        self.software = f"torch-neuronx {versions['torch-neuronx']}"
        self.facts = {"device": "neuron", "target": target, "compiler_args": self.compiler_args, "versions": versions}

    def describe(self, dtype):
        return f"neuron ({self.target}): {self.software}"

    def weights_facts(self, folder):
        """The graph's file holds the weights."""
        return {"weights": weight_loader.fingerprint(folder)}

    def prepare(self, gpt, dtype):
        gpt = gpt.to(getattr(torch, dtype))
        for parameter in gpt.parameters():
            parameter.data = parameter.contiguous()
        return gpt

    def trace(self, module, inputs):
        import torch_neuronx

        graph = torch_neuronx.trace(
            module,
            inputs,
            # the device then updates the cache in place
            input_output_aliases={parameter: 1 + i for i, parameter in enumerate(module.cache)},
            compiler_args=self.compiler_args,
            inline_weights_to_neff=False,  # or every bucket's program would hold all weights
        )
        for state in self.states(graph):
            state.zero_()
        return graph

    def load(self, file, module):
        """The graph, and its cache on the device."""
        import torch_neuronx

        graph = torch.jit.load(file)
        torch_neuronx.move_trace_to_device(graph, 0)  # or weights and states would be copied at each call
        cache = self.states(graph)  # read here, since the move replaces the tensors
        if self.cores > 1:
            devices = list(range(self.cores))
            graph = torch_neuronx.DataParallel(graph, device_ids=devices, dim=0, set_dynamic_batching=False)
        return graph, cache

    def fill(self, cache, new):
        cache.copy_(F.pad(new, (0, 0, 0, cache.shape[2] - new.shape[2])))  # the whole state, as in AWS's T5 tutorial

    def states(self, graph):
        return [tensor for name, tensor in graph.named_parameters() if name.startswith("states.")]


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def set_attribute(graph, name, value):
    *path, leaf = name.split(".")
    for part in path:
        graph = getattr(graph, part)
    setattr(graph, leaf, value)


class Compiler:
    """The graphs of one checkpoint, by one backend, kept in the current directory."""

    def __init__(self, backend, folder, dtype, recompile=False):
        self.backend, self.dtype, self.recompile = backend, dtype, recompile
        self.facts = backend.facts | backend.weights_facts(folder) | {"dtype": dtype, "code": hash_code()}
        self.compile_s = 0.0

    def describe(self):
        return self.backend.describe(self.dtype)

    def prepare(self, gpt):
        """Converts a model in place, which spares the memory of a second one."""
        return self.backend.prepare(gpt, self.dtype)

    def build(self, module, inputs, name):
        """The module's graph, reused from the file of this name or traced and saved there; and its cache."""
        start, path = time.perf_counter(), Path(name)
        wanted = self.facts | {"graph": type(module).__name__}
        wanted |= {"inputs": [[list(tensor.shape), str(tensor.dtype)] for tensor in inputs]}
        data, why = (None, "--recompile") if self.recompile else find_artifact(path, wanted)
        verb = "reused" if data else "traced"
        if not data:
            file = io.BytesIO()
            torch.jit.save(self.backend.trace(module, inputs), file)
            data = file.getvalue()
            save_artifact(path, data, wanted)
        graph, cache = self.backend.load(io.BytesIO(data), module)
        seconds = time.perf_counter() - start
        self.compile_s += seconds
        print(f"{name}: {verb} in {seconds:.1f} s" + (f" ({why})" if why else ""), flush=True)
        return graph, cache


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
