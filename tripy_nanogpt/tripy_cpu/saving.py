"""An executable as files: a safetensors file, whose header holds the program as JSON, and a file of large constants.

nvtripy's own format is JSON alone, whose decoding took longer than everything else at a start.
"""

import hashlib
import json
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from nvtripy import Executable
from nvtripy.common.exception import raise_error
from nvtripy.utils.json import from_json, to_json
from nvtripy.utils.utils import load_file, save_file

from . import weights
from .kernels import DTYPES, Node
from .program import ERRORS, Program
from .weights import CHOICES, LARGE, Weight, digest, in_huge_pages, share

FORMAT = "tripy_cpu 6"
ATTRIBUTES = ("_arg_names", "_return_single_tensor_as_sequence", "input_infos", "_access_plan_by_name")
ALIGNMENT = 64  # bytes, of a tensor in the file of large constants


def save(executable, path):
    """The program, and next to it a file of large constants, which is named by its content: programs may share it."""
    program, small, large, constants = executable._executable, {}, {}, {}
    for name, value in program.constants.items():
        parts = value.tensors() if isinstance(value, Weight) else [value]
        if not hasattr(value, "digests"):  # the parts do not change
            value.digests = [*map(digest, parts)]
        for part, (dtype, shape, key) in zip(parts, value.digests, strict=True):
            if part.numel() < LARGE:
                small[key] = part.contiguous()
            else:
                large[key] = dtype, shape, part
        constants[name] = [getattr(value, "kind", "Tensor"), [key for *_, key in value.digests]]
    weights, places = write_weights(Path(path).parent, large)
    about = {
        "format": FORMAT,
        "program": [program.inputs, program.nodes, program.outputs, constants],
        "weights": [weights, places],
        "executable": to_json({name.lstrip("_"): getattr(executable, name) for name in ATTRIBUTES}),
    }
    save_file(safetensors.torch.save(small, {"tripy_cpu": json.dumps(about)}), path)


def write_weights(folder, large):
    """(name of the file, where each tensor is in it)."""
    places, offset = {}, 0
    for key in sorted(large):
        dtype, shape, _ = large[key]
        places[key] = dtype, shape, offset
        offset += -(-math.prod(shape) * getattr(torch, dtype).itemsize // ALIGNMENT) * ALIGNMENT
    path = folder / f"{hashlib.sha256(json.dumps(places).encode()).hexdigest()[:16]}.weights"
    if large and not (path.exists() and path.stat().st_size == offset):
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                for key, (*_, start) in places.items():
                    file.seek(start)
                    file.write(large[key][2].flatten().view(torch.uint8).numpy())
                file.truncate(offset)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return path.name, places


def load(path):
    data = load_file(path)
    try:
        about = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["tripy_cpu"])
        if about["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {about['format']}")
        inputs, nodes, outputs, held = about["program"]
        name, places = about["weights"]
        read = partial(read_tensor, safetensors.torch.load(data), Path(path).with_name(Path(name).name), places)
        constants = {name: constant(kind, keys, read) for name, (kind, keys) in held.items()}
        program = Program(inputs, [Node(*n) for n in nodes], outputs, constants)
        return Executable(program, **from_json(about["executable"]))
    except (OSError, KeyError, TypeError, AttributeError, safetensors.SafetensorError, *ERRORS) as error:
        raise_error(f"{path} is not an executable for the CPU: {error}")


def constant(kind, keys, read):
    if kind == "Tensor":
        return share((kind, *keys), lambda: read(keys[0]))
    CHOICES[kind]  # a KeyError reports an unknown one
    shapes = [tuple(read(key).shape) for key in keys]

    def tensors():
        return [in_huge_pages(read(key)) for key in keys]

    return share((kind, weights.FAST, *keys), lambda: Weight(kind, tensors, shapes))


def read_tensor(small, path, places, key):
    """Mapped from the file, if large: what is no longer referenced takes no memory."""
    if key in small:
        return small[key]
    dtype, shape, offset = places[key]
    dtype = next(each for each in DTYPES.values() if each == getattr(torch, dtype))
    raw = np.memmap(path, np.uint8, "c", offset, math.prod(shape) * dtype.itemsize)
    return torch.from_numpy(raw).view(dtype).reshape(shape)
