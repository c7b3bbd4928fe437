"""From a module to a graph: traced, saved beside what it was made from, and loaded only where all of that still holds.

Two engines have the same few methods. `Neuron` is torch_neuronx.trace, for a NeuronCore. `CPU` is torch.jit.trace of
the same modules, for any machine.
"""

import hashlib
import importlib.metadata
import inspect
import io
import json
import os
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from neuron_nanogpt import kernels, model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGETS = ("trn1", "trn2", "inf2")
DRIVER = Path("/dev/neuron0")
INDEX = "https://pip.repos.neuron.amazonaws.com"


def choose(device, target, compiler_args):
    """The engine that --device names; auto is a NeuronCore where there is one."""
    missing = why_no_neuron()
    if device == "neuron" and missing:
        raise ValueError(f"device is neuron, but {missing}")
    return CPU(missing) if device == "cpu" or missing else Neuron(target, compiler_args)


def why_no_neuron():
    if find_spec("torch_neuronx") is None:
        return "torch-neuronx is not installed"
    import torch_neuronx

    if not hasattr(torch_neuronx, "trace"):
        return f"the torch_neuronx here is PyPI's empty placeholder: the real one is at {INDEX} (see requirements.txt)"
    return None if DRIVER.exists() else f"there is no {DRIVER}"


class CPU:
    name, target = "cpu", None
    software = f"TorchScript of torch {torch.__version__}"

    def __init__(self, missing):
        self.missing = missing
        self.plain = [name for name, dtype in DTYPES.items() if not kernels.can_pack(dtype)]

    def describe(self, *dtypes):
        parts = [f"cpu: {self.software}"] + ([self.missing] if self.missing else [])
        if plain := [dtype for dtype in dtypes if dtype in self.plain]:
            parts.append(f"{' and '.join(plain)} by PyTorch's plain kernels")
        return ", ".join(parts)

    def about(self):
        about = {"device": "cpu", "target": None, "compiler_args": [], "plain_kernels": self.plain}
        return about | {"versions": {"torch": torch.__version__}}

    def prepare(self, gpt):
        return kernels.prepare(gpt)

    def trace(self, module, inputs, aliases):
        """The graph without its weights: they are the model's, and every graph shares them."""
        graph = torch.jit.trace(module, inputs, check_trace=False)
        for name, tensor in module.state_dict().items():
            put(graph, name, torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))  # one number on disk
        return graph

    def load(self, file, module):
        graph = torch.jit.load(file).eval()
        for name, tensor in module.state_dict().items():
            put(graph, name, tensor)
        return torch.jit.freeze(graph)  # a cache, which it changes, stays an attribute: the module's own tensor

    def states(self, graph, module):
        return list(module.cache)


class Neuron:
    name = "neuron"

    def __init__(self, target, compiler_args):
        self.target = target
        # auto-cast would turn float32 products into bfloat16; GPT-2's masks overflow without the last
        fixed = [f"--target={target}", "--model-type=transformer", "--auto-cast=none", "--enable-saturate-infinity"]
        self.compiler_args = fixed + compiler_args
        self.versions = {name: version(name) for name in ("torch", "torch-neuronx", "neuronx-cc")}
        self.software = f"torch-neuronx {self.versions['torch-neuronx']}"

    def describe(self, *dtypes):
        return f"neuron ({self.target}): {self.software}"

    def about(self):
        about = {"device": "neuron", "target": self.target, "compiler_args": self.compiler_args}
        return about | {"versions": self.versions}

    def prepare(self, gpt):
        return gpt

    def trace(self, module, inputs, aliases):
        import torch_neuronx

        graph = torch_neuronx.trace(
            module,
            inputs,
            input_output_aliases=aliases,
            compiler_args=self.compiler_args,
            inline_weights_to_neff=False,  # or every bucket's program would hold all weights
        )
        for state in self.states(graph, module):
            state.zero_()
        return graph

    def load(self, file, module):
        import torch_neuronx

        graph = torch.jit.load(file)
        torch_neuronx.move_trace_to_device(graph, 0)  # weights and states; without it they travel at each call
        return graph

    def states(self, graph, module):
        """The cache on the device. Asked for after move_trace_to_device, which puts new tensors there."""
        return [tensor for name, tensor in graph.named_parameters() if name.startswith("states.")]


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def put(graph, name, tensor):
    *path, leaf = name.split(".")
    for part in path:
        graph = getattr(graph, part)
    setattr(graph, leaf, tensor)


# -- artifacts


def build(engine, module, inputs, path, facts, aliases=None, recompile=False, tell=print):
    """The graph of a module, from path if what lies there was made from the same, else traced and saved there.

    A file that its sidecar does not vouch for is an error: a graph is a program, and nobody knows whose this is.
    """
    wanted = (
        engine.about()
        | facts
        | {
            "inputs": [[list(tensor.shape), str(tensor.dtype)] for tensor in inputs],
            "code": hash_code(type(module)),
        }
    )
    start = time.perf_counter()
    data, verb, changed = None, "reused", "it is asked for" if recompile else ""
    if path.exists() and not recompile:
        data, given = vouched(path)
        changed = difference(given, wanted)
    if data is None or changed:
        data, verb = traced(engine, module, inputs, aliases or {}), "traced"
        sidecar = {"sha256": hashlib.sha256(data).hexdigest()} | wanted
        write_files({path: data, path.with_suffix(".json"): json.dumps(sidecar, indent=2).encode() + b"\n"})
    graph = engine.load(io.BytesIO(data), module)
    why = f", for {changed}" if changed else ""
    tell(f"{path.name}: {verb} in {time.perf_counter() - start:.1f} s{why}")
    return graph


def traced(engine, module, inputs, aliases):
    file = io.BytesIO()
    torch.jit.save(engine.trace(module, inputs, aliases), file)
    return file.getvalue()


def vouched(path):
    """The artifact's bytes, and what it was made from, by the sidecar that knows these bytes."""
    sidecar, advice = path.with_suffix(".json"), "delete it, or say --recompile"
    for pause in (0.1, 0.2, 0.4, 0):  # another run may be putting the two in place
        data = path.read_bytes()
        try:
            given = json.loads(sidecar.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            problem = f"{path} has no readable {sidecar.name} beside it ({error}): {advice}"
        else:
            if isinstance(given, dict) and given.get("sha256") == hashlib.sha256(data).hexdigest():
                return data, given
            problem = f"{path} is not the file that {sidecar.name} describes (its SHA-256 is another): {advice}"
        time.sleep(pause)
    raise ValueError(problem)


def difference(given, wanted):
    """What the artifact was made from that is different now, in words; nothing if it can be used as it is."""
    for key, value in wanted.items():
        if key != "model" and given.get(key) != value:
            opaque = key in ("weights", "code")
            return f"the {key} changed" if opaque else f"{key} was {given.get(key)} and is {value}"
    return ""


def hash_code(kind):
    """SHA-256 of the source that the graph's operations come from: the module's classes, the model and the kernels."""
    sources = [part for part in kind.__mro__ if part.__module__ == kind.__module__] + [model, kernels]
    return hashlib.sha256("".join(map(inspect.getsource, sources)).encode()).hexdigest()


def write_files(contents):
    """Each file beside its place first, then all of them moved there: they are whole, or not there."""
    parts = {path: path.with_name(f"{path.name}.{os.getpid()}.part") for path in contents}
    try:
        for path, part in parts.items():
            part.write_bytes(contents[path])
        for path, part in parts.items():
            os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
