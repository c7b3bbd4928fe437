"""Several devices: a mesh of three axes, and which part of an array each device holds.

    data    copies of the parameters; each takes a share of the batch
    fsdp    a share of the batch too, but each device keeps a slice of the parameters and of the optimizer's state,
            and gathers a layer's when it comes to it (ZeRO, arXiv 1910.02054)
    tensor  a share of the positions, in attention of the heads (arXiv 2309.14509), in the MLP of the hidden units
            (arXiv 2205.05198)

XLA makes the communication from what is said here; no function of the model or the optimizer has any in it.
"""

import math

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # what the examples are split over


def parse(text):
    """data:2,fsdp:4 -> {"data": 2, "fsdp": 4, "tensor": 1}"""
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition(":")
        if axis not in AXES or axis in sizes or not (size.isascii() and size.isdigit() and int(size)):
            allowed = "data, fsdp and tensor, each at most once and with its size, as in data:2,fsdp:4, are expected"
            raise ValueError(f"mesh is {text!r}: {part!r} is not one of its axes; {allowed}")
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def default(devices, batch_size, model_config):
    """As many slices as the batch can be shared by; what is left over shares the heads."""
    shares = math.gcd(devices, batch_size)
    if model_config.n_head % (devices // shares):
        raise ValueError(
            f"batch_size is {batch_size}, which {devices} devices cannot share: a multiple of {devices} is expected"
        )
    axis = "data" if model_config.n_embd % shares else "fsdp"
    return {"data": 1, "fsdp": 1, "tensor": devices // shares} | {axis: shares}


def make_mesh(text, devices, batch_size, model_config):
    """The mesh that text asks for, or a sensible one; ValueError says what does not fit."""
    sizes = parse(text) if text else default(len(devices), batch_size, model_config)
    if (taken := math.prod(sizes.values())) != len(devices):
        raise ValueError(f"mesh is {text}, of {taken} devices, but there are {len(devices)} here")
    shares = sizes["data"] * sizes["fsdp"]
    for name, value, parts, of in (
        ("batch_size", batch_size, shares, "data times fsdp"),
        ("n_embd", model_config.n_embd, sizes["fsdp"], "fsdp"),
        ("n_head", model_config.n_head, sizes["tensor"], "tensor"),
    ):
        if value % parts:
            raise ValueError(f"mesh is {text}, but {name} is {value}: a multiple of {of} ({parts}) is expected")
    return jax.make_mesh([*sizes.values()], AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def show(mesh):
    """For the first line of output: the axes that split something, as --mesh has them."""
    sizes = [f"{axis}:{size}" for axis, size in mesh.shape.items() if size > 1]
    return f", mesh {','.join(sizes)}" if sizes else ""


def parts_of(path, leaf):
    """The axes that split a parameter, or the array of the optimizer's state that belongs to it: by its name."""
    module, name = [getattr(key, "key", None) for key in (None, *path)][-2:]
    if name == "kernel":  # into a branch its columns are heads or hidden units, out of it its rows are
        return P("tensor", "fsdp") if module == "c_proj" else P("fsdp", "tensor")
    return P(None, "fsdp") if leaf.ndim == 2 else P()  # the embeddings; GPT-2's vocabulary divides by nothing useful


def shapes_on(mesh, make, *args):
    """What make(*args) would give, params or an optimizer's state: shapes, and where each array lies on the mesh."""

    def place(path, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, parts_of(path, leaf)))

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(make, *args))


def make_on(like, make, *args):
    """make(*args), each device only its part."""
    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))(*args)


def lay_out(tree, like):
    """Arrays that are here whole, taken apart."""
    return jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, like))


@jax.jit
def highest(numbers):
    """The highest of the numbers that the processes have: an array, to be looked at when it is needed."""
    return split(numbers.max())


def from_each(mesh, number):
    """What a jitted function takes for the processes' numbers."""
    return jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, P(AXES)), lambda _: np.array([number], np.int32)
    )


def split(x, *axes):
    """In a jitted function: x lies so, each dimension split by the axes named for it. Without a mesh it is only x."""
    return x if jax.sharding.get_abstract_mesh().empty else lax.with_sharding_constraint(x, P(*axes))


def split_state(tree):
    """In a jitted function: params, their gradients or the optimizer's state lie as in shapes_on."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: split(leaf, *parts_of(path, leaf)), tree)
