"""Several devices: a mesh of three axes, and how each array is sharded over them.

    data    replicates the parameters; each replica takes a share of the batch
    fsdp    takes a share of the batch too, but each device keeps a shard of the parameters and of the optimizer state,
            and all-gathers a layer's parameters when it needs them (ZeRO, arXiv 1910.02054)
    tensor  shards the sequence, in attention the heads (arXiv 2309.14509), in the MLP the hidden units
            (arXiv 2205.05198)

XLA derives all communication from these shardings: the model and the optimizer contain none.
"""

import math

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that shard the examples


def parse(text):
    """data:2,fsdp:4 -> {"data": 2, "fsdp": 4, "tensor": 1}"""
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition(":")
        if axis not in AXES or axis in sizes or not (size.isascii() and size.isdigit() and int(size)):
            allowed = "data, fsdp and tensor with their sizes, each at most once, as in data:2,fsdp:4"
            raise ValueError(f"mesh must be {allowed}, got {part!r} in {text!r}")
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def default_sizes(devices, batch_size, model_config):
    """As many fsdp shards as divide the batch; the devices that remain share the heads."""
    shards = math.gcd(devices, batch_size)
    if model_config.n_head % (devices // shards):
        raise ValueError(f"batch_size must be a multiple of {devices}, the number of devices, got {batch_size}")
    axis = "data" if model_config.n_embd % shards else "fsdp"
    return {"data": 1, "fsdp": 1, "tensor": devices // shards} | {axis: shards}


def make_mesh(text, devices, batch_size, model_config):
    """The mesh that text describes, or a default one; a ValueError says what does not fit."""
    sizes = parse(text) if text else default_sizes(len(devices), batch_size, model_config)
    if (size := math.prod(sizes.values())) != len(devices):
        raise ValueError(f"mesh must have as many devices as there are here ({len(devices)}), got {size} in {text}")
    shards = sizes["data"] * sizes["fsdp"]
    for name, value, divisor, axes in (
        ("batch_size", batch_size, shards, "data times fsdp"),
        ("n_embd", model_config.n_embd, sizes["fsdp"], "fsdp"),
        ("n_head", model_config.n_head, sizes["tensor"], "tensor"),
    ):
        if value % divisor:
            raise ValueError(f"{name} must be a multiple of {axes} ({divisor}) for mesh {text}, got {value}")
    return jax.make_mesh([*sizes.values()], AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def describe(mesh):
    """For the first line of output: the axes larger than 1, as --mesh takes them."""
    sizes = [f"{axis}:{size}" for axis, size in mesh.shape.items() if size > 1]
    return f", mesh {','.join(sizes)}" if sizes else ""


def partition_spec(path, leaf):
    """The axes that shard a parameter, or the optimizer's array of the same name."""
    module, name = [getattr(key, "key", None) for key in (None, *path)][-2:]
    if name == "kernel":  # into a branch the columns are heads or hidden units, out of it the rows are
        return P("tensor", "fsdp") if module == "c_proj" else P("fsdp", "tensor")
    return P(None, "fsdp") if leaf.ndim == 2 else P()  # embeddings; GPT-2's vocabulary has no useful divisor


def shapes_on(mesh, init, *args):
    """The shapes and shardings of what init(*args) returns: parameters or an optimizer state."""

    def place(path, leaf):
        sharding = NamedSharding(mesh, partition_spec(path, leaf))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(init, *args))


def init_sharded(like, init, *args):
    """init(*args), of which each device computes its own shards."""
    return jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))(*args)


def shard(tree, like):
    """Whole arrays, sharded over the devices."""
    return jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, like))


def constrain(x, *axes):
    """In a jitted function: shards each dimension of x over the axes named for it. Without a mesh, x as it is."""
    return x if jax.sharding.get_abstract_mesh().empty else lax.with_sharding_constraint(x, P(*axes))


def constrain_state(tree):
    """In a jitted function: shards parameters, gradients or the optimizer state as shapes_on does."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: constrain(leaf, *partition_spec(path, leaf)), tree)


def max_over_processes(mesh, number):
    """The largest of the processes' numbers, as an array that is not waited for."""
    per_device = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, P(AXES)), lambda _: np.array([number], np.int32)
    )
    return _max(per_device)


@jax.jit
def _max(numbers):
    return constrain(numbers.max())
