"""torch_neuronx for the tests: its documented contract, enforced, around TorchScript on the CPU.

What it refuses, the real one refuses or gets wrong: arguments by position, inputs that are not tensors, other shapes or
dtypes than those traced, inference mode, parameters that the graph does not read, control flow that depends on data,
replicas of a trace that was moved. As there, only parameters are aliased, and a buffer is dropped without a word; the
states are in `trace.states`, in the order of the function's parameters; move_trace_to_device replaces their tensors;
traces are loaded to the cores in turn, but for those in neuron_cores_context; the compiler prints on stdout. Tracing
leaves in the state what the function wrote there. With `binds`, a graph reads at its first call where its states are,
and later writes from outside change nothing. Without --auto-cast=none float32 is rounded to bfloat16; without
--enable-saturate-infinity a trn1's masks overflow.
"""

import contextlib
import importlib.machinery
import types

import torch
import torch.nn as nn

TARGETS = ("inf2", "trn1", "trn1n", "trn2", "trn3")


class Graph(nn.Module):
    """The function with its states as inputs."""

    def __init__(self, func, names, count):
        super().__init__()
        self.func, self.names, self.count = func, names, count

    def forward(self, tensors: list[torch.Tensor]):
        places = [self.func.get_submodule(path)._parameters for path, _, _ in (n.rpartition(".") for n in self.names)]
        leaves = [name.rpartition(".")[2] for name in self.names]
        kept = [place[leaf] for place, leaf in zip(places, leaves, strict=True)]
        try:
            for place, leaf, state in zip(places, leaves, tensors[self.count :], strict=True):
                place[leaf] = state
            out = self.func(*tensors[: self.count])
        finally:
            for place, leaf, parameter in zip(places, leaves, kept, strict=True):
                place[leaf] = parameter
        return [out] if isinstance(out, torch.Tensor) else list(out)


LIBRARY = torch.library.Library("standin", "DEF")
LIBRARY.define("buffer(Tensor state) -> Tensor")
BOUND = {}  # the address of a state -> the state and its buffer


@torch.library.impl(LIBRARY, "buffer", "CPU")
def buffer(state):
    """The memory that a graph reads for this state: with StandIn.binds, what was in the state at the first call."""
    if not StandIn.binds:
        return state
    return BOUND.setdefault(state.data_ptr(), (state, state.clone()))[1]


class NeuronModule(nn.Module):
    def __init__(self, graph, states, inputs, outputs: list[int], shown: int, options: list[str]):
        super().__init__()
        self.graph = graph
        self.states = nn.ParameterList(nn.Parameter(state.clone(), requires_grad=False) for state in states)
        self.shapes: list[list[int]] = [list(tensor.shape) for tensor in inputs]
        self.dtypes: list[int] = [number(tensor.dtype) for tensor in inputs]
        self.outputs = torch.jit.Attribute(outputs, list[int])
        self.shown: int = shown
        self.rounds: bool = "--auto-cast=none" not in options
        self.overflows: bool = "--target=trn1" in options and "--enable-saturate-infinity" not in options

    def forward(self, first, second):
        tensors = [first, second]
        for tensor, shape, dtype in zip(tensors, self.shapes, self.dtypes):  # noqa: B905, TorchScript knows no strict
            assert list(tensor.shape) == shape, "the shape is not the one traced"
            assert tensor.dtype == dtype, "the dtype is not the one traced"
        for state in self.states:
            tensors.append(torch.ops.standin.buffer(state))
        out = self.graph(tensors)
        for index, state in zip(self.outputs, tensors[2:]):  # noqa: B905
            state.copy_(out[index])
        if self.rounds:
            out = [tensor.to(torch.bfloat16).to(tensor.dtype) for tensor in out]
        if self.overflows:
            out = [tensor * float("nan") for tensor in out]
        return out[: self.shown]


def number(dtype):
    """TorchScript's number of a dtype."""

    @torch.jit.script
    def numbered(tensor):
        return tensor.dtype

    return numbered(torch.zeros(1, dtype=dtype))


def other(tensor):
    """Other data of the same shape, above zero: small numbers are a token's id, a length and a position alike."""
    if tensor.is_floating_point():
        return torch.rand_like(tensor)
    return torch.randint(2, 4, tensor.shape, dtype=tensor.dtype)


class StandIn(types.ModuleType):
    """The module, with a record of its calls. The documents do not say whether aliased outputs are returned."""

    binds = False

    def __init__(self, aliased_are_returned=False):
        super().__init__("torch_neuronx")
        self.__spec__ = importlib.machinery.ModuleSpec("torch_neuronx", None)
        self.aliased_are_returned = aliased_are_returned
        self.traced, self.moved, self.parallel = [], [], []
        self.placed, self.core = [], None  # the core of each trace that was loaded; that of the context
        self.experimental = types.SimpleNamespace(neuron_cores_context=self.neuron_cores_context)

    def trace(
        self,
        func,
        example_inputs,
        *_,
        input_output_aliases={},  # noqa: B006, as documented
        compiler_workdir=None,
        compiler_args=None,
        partitioner_config=None,
        inline_weights_to_neff=True,
        cpu_backend=False,
    ):
        if _:
            raise TypeError("what follows example_inputs is given by keyword")
        if not isinstance(example_inputs, tuple) or not all(isinstance(x, torch.Tensor) for x in example_inputs):
            raise TypeError("example_inputs is a tuple of tensors")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("parameters cannot be moved to another device in inference mode")
        options = compiler_args.split() if isinstance(compiler_args, str) else list(compiler_args or [])
        check_target(options, cpu_backend)
        aliases = {id(tensor): index for tensor, index in input_output_aliases.items()}
        kept = {name: p for name, p in func.named_parameters() if id(p) in aliases}
        states, outputs = [*kept.values()], [aliases[id(parameter)] for parameter in kept.values()]
        graph = Graph(func, [*kept], len(example_inputs))
        compiled, out = compile_graph(graph, example_inputs, states, outputs)
        print(".\nCompiler status PASS")
        shown = len(out) if self.aliased_are_returned else len(out) - len(outputs)
        call = {"kind": type(func).__name__, "args": options, "inline": inline_weights_to_neff, "names": [*kept]}
        call |= {"on_cpu": cpu_backend, "shapes": moved_shapes(func)}
        self.traced.append(types.SimpleNamespace(**call))
        left = [out[index] for index in outputs]
        return torch.jit.script(NeuronModule(compiled, left, example_inputs, outputs, shown, options))

    @contextlib.contextmanager
    def neuron_cores_context(self, start_nc, nc_count=-1):
        assert nc_count == 1
        self.core = start_nc
        try:
            yield
        finally:
            self.core = None

    def loaded(self):
        """Called for each trace that is loaded."""
        self.placed.append(len(self.placed) if self.core is None else self.core)

    def move_trace_to_device(self, trace, device_id):
        assert isinstance(device_id, int)
        for name, state in trace.states.named_parameters():
            trace.states._parameters[name] = state.clone()
        self.moved.append(trace)

    def DataParallel(self, model, device_ids=None, dim=0, set_dynamic_batching=True):
        assert not any(model is moved for moved in self.moved), "it loads the replicas itself"
        assert self.traced[-1].inline and not [*model.states.named_parameters()]
        self.parallel.append(device_ids)

        def call(*tensors):
            shards = zip(*(tensor.chunk(len(device_ids), dim) for tensor in tensors), strict=True)
            outs = [model(*shard) for shard in shards]
            return [torch.cat(parts, dim) for parts in zip(*outs, strict=True)]

        return call


def moved_shapes(func):
    """Of each parameter on the XLA device, where one that two modules share becomes two."""
    owners = [part for part in func.modules() if not isinstance(part, nn.ParameterList)]
    return [
        tuple(parameter.shape) for part in owners for parameter in part._parameters.values() if parameter is not None
    ]


def check_target(options, cpu_backend):
    targets = [option.partition("=")[2] for option in options if option.startswith("--target")]
    if any(target not in TARGETS for target in targets) or cpu_backend and not targets:
        raise ValueError(f"--target {targets}")


def compile_graph(graph, inputs, states, outputs):
    """The traced graph and its outputs, if its states and its control flow are as documented."""
    before = [state.clone() for state in states]
    compiled = torch.jit.trace(graph, ([*inputs, *states],), check_trace=False, strict=False)
    out = compiled([*inputs, *states])
    if not all(torch.equal(state, old) for state, old in zip(states, before, strict=True)):
        raise RuntimeError("the function changes its state in place, but must return the new one")
    for state, index in zip(states, outputs, strict=True):
        if not 0 < index < len(out) or (out[index].shape, out[index].dtype) != (state.shape, state.dtype):
            raise ValueError(f"output {index} is not the new value of the parameter that is aliased to it")
    data = [*map(other, inputs), *map(torch.randn_like, states)]
    others = [*data[: len(inputs)], *map(torch.randn_like, states)]
    if states and all(map(torch.equal, compiled(data), compiled(others))):
        raise RuntimeError("a state that the graph does not read is no parameter of its HLO")
    for replayed, computed in zip(compiled(data), graph(data), strict=True):
        if not torch.allclose(replayed, computed, atol=1e-3):
            raise RuntimeError("control flow depends on data: the trace gives another result than the function")
    return compiled, out
