"""torch_neuronx for the tests: its documented contract, enforced, around TorchScript on the CPU.

What it refuses, the real one refuses or gets wrong: arguments by position, inputs that are not tensors, other shapes or
dtypes than those traced, aliases of what is not a parameter, control flow that depends on data. As there, the state is
in `trace.states`, and move_trace_to_device replaces its tensors. Tracing leaves in the state what the function wrote
there. Without --auto-cast=none float32 is rounded to bfloat16; without --enable-saturate-infinity a trn1's masks
overflow.
"""

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


class NeuronModule(nn.Module):
    def __init__(self, graph, states, inputs, outputs: list[int], shown: int, options: list[str]):
        super().__init__()
        self.graph = graph
        self.states = nn.ParameterList(nn.Parameter(state.clone(), requires_grad=False) for state in states)
        self.shapes: list[list[int]] = [list(tensor.shape) for tensor in inputs]
        self.dtypes: list[int] = [number(tensor.dtype) for tensor in inputs]
        self.outputs: list[int] = outputs
        self.shown: int = shown
        self.rounds: bool = "--auto-cast=none" not in options
        self.overflows: bool = "--target=trn1" in options and "--enable-saturate-infinity" not in options

    def forward(self, first, second):
        tensors = [first, second]
        for tensor, shape, dtype in zip(tensors, self.shapes, self.dtypes):  # noqa: B905, TorchScript knows no strict
            assert list(tensor.shape) == shape, "the shape is not the one traced"
            assert tensor.dtype == dtype, "the dtype is not the one traced"
        for state in self.states:
            tensors.append(state)
        out = self.graph(tensors)
        for i, state in enumerate(self.states):
            state.copy_(out[self.outputs[i]])
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

    def __init__(self, aliased_are_returned=False):
        super().__init__("torch_neuronx")
        self.__spec__ = importlib.machinery.ModuleSpec("torch_neuronx", None)
        self.aliased_are_returned = aliased_are_returned
        self.traced, self.moved, self.parallel = [], [], []

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
        options = compiler_args.split() if isinstance(compiler_args, str) else list(compiler_args or [])
        check_target(options, cpu_backend)
        parameters = {id(parameter): name for name, parameter in func.named_parameters()}
        if not all(id(parameter) in parameters for parameter in input_output_aliases):
            raise ValueError("every key of input_output_aliases must be a parameter of the function")
        names = [parameters[id(parameter)] for parameter in input_output_aliases]
        states, outputs = list(input_output_aliases), list(input_output_aliases.values())
        graph = Graph(func, names, len(example_inputs))
        compiled, out = compile_graph(graph, example_inputs, states, outputs)
        shown = len(out) if self.aliased_are_returned else len(out) - len(outputs)
        call = {"kind": type(func).__name__, "args": options, "inline": inline_weights_to_neff, "names": names}
        self.traced.append(types.SimpleNamespace(**call))
        left = [out[index] for index in outputs]
        return torch.jit.script(NeuronModule(compiled, left, example_inputs, outputs, shown, options))

    def move_trace_to_device(self, trace, device_id):
        assert isinstance(device_id, int)
        for name, state in trace.states.named_parameters():
            trace.states._parameters[name] = state.clone()
        self.moved.append(device_id)

    def DataParallel(self, model, device_ids=None, dim=0, set_dynamic_batching=True):
        assert not [name for name, _ in model.named_parameters() if name.startswith("states.")]
        self.parallel.append(device_ids)

        def call(*tensors):
            shards = zip(*(tensor.chunk(len(device_ids), dim) for tensor in tensors), strict=True)
            outs = [model(*shard) for shard in shards]
            return [torch.cat(parts, dim) for parts in zip(*outs, strict=True)]

        return call


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
    for replayed, computed in zip(compiled(data), graph(data), strict=True):
        if not torch.allclose(replayed, computed, atol=1e-3):
            raise RuntimeError("control flow depends on data: the trace gives another result than the function")
    return compiled, out
