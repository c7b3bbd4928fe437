"""Several devices: a mesh of three axes, and how each array is sharded over them.

    data    replicates the parameters; each replica takes a share of the batch
    fsdp    takes a share of the batch too, but each device keeps a shard of the parameters and of the optimizer state,
            and all-gathers a layer's parameters when it needs them (ZeRO, arXiv 1910.02054)
    tensor  shards the sequence, in attention the heads (arXiv 2309.14509), in the MLP the hidden units
            (arXiv 2205.05198)

XLA derives the communication from these shardings: the model and the optimizer contain none, the loss one sum.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that shard the examples
STATE_BYTES = 16  # of a parameter: float32, its gradient, and AdamW's two moments
MEMORY_BYTES = 32e9  # of a device that does not say how much it has


def parse_mesh(text: str) -> dict[str, int]:
    """data:2,fsdp:4 -> {"data": 2, "fsdp": 4, "tensor": 1}"""
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition(":")
        if axis not in AXES or axis in sizes or not (size.isascii() and size.isdigit() and int(size)):
            allowed = "data, fsdp and tensor with their sizes, each at most once, as in data:2,fsdp:4"
            raise ValueError(f"mesh must be {allowed}, got {part!r} in {text!r}")
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def fits(parameters: int, device: jax.Device) -> bool:
    """Whether the parameters, gradients and optimizer state take at most half of a device's memory."""
    memory = (device.memory_stats() or {}).get("bytes_limit", MEMORY_BYTES)
    return STATE_BYTES * parameters <= memory / 2


def default_sizes(devices: int, examples: int, n_head: int, replicate: bool) -> dict[str, int]:
    """As many shards of the examples as divide them; the devices that remain share the heads."""
    shards = math.gcd(devices, examples)
    if n_head % (devices // shards):
        name = "batch_size times gradient_accumulation_steps"
        raise ValueError(f"{name} must be a multiple of {devices}, the number of devices, got {examples}")
    return {"data": 1, "fsdp": 1, "tensor": devices // shards} | {"data" if replicate else "fsdp": shards}


def make_mesh(text: str, devices: Sequence[jax.Device], examples: int, model_config: Any, parameters: int) -> Mesh:
    """The mesh that text describes, or a default one; a ValueError says what does not fit. examples are those of an
    iteration. The parameters are replicated by default, and sharded only if a device cannot hold them: gathering them
    costs more communication."""
    if text:
        sizes = parse_mesh(text)
    else:
        own = next(device for device in devices if device.process_index == jax.process_index())  # it shows its memory
        sizes = default_sizes(len(devices), examples, model_config.n_head, fits(parameters, own))
        text = show_sizes(sizes)
    if (size := math.prod(sizes.values())) != len(devices):
        raise ValueError(f"mesh must have as many devices as there are here ({len(devices)}), got {size} in {text}")
    for name, value, divisor, axes in (
        ("batch_size times gradient_accumulation_steps", examples, sizes["data"] * sizes["fsdp"], "data times fsdp"),
        ("n_embd", model_config.n_embd, sizes["fsdp"], "fsdp"),
        ("n_head", model_config.n_head, sizes["tensor"], "tensor"),
        ("block_size", model_config.block_size, sizes["tensor"], "tensor"),
    ):
        if value % divisor:
            raise ValueError(f"{name} must be a multiple of {axes} ({divisor}) for mesh {text}, got {value}")
    return jax.make_mesh([*sizes.values()], AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def show_sizes(sizes: dict[str, int]) -> str:
    """The axes larger than 1, as --mesh takes them."""
    return ",".join(f"{axis}:{size}" for axis, size in sizes.items() if size > 1)


def describe_mesh(mesh: Mesh) -> str:
    """For the first line of output."""
    return f", mesh {show_sizes(mesh.shape)}" if mesh.size > 1 else ""


def micro_batches(mesh: Mesh, accumulation: int, batch_size: int) -> tuple[int, int]:
    """(how many an iteration has, the examples of one on all devices). Devices share an iteration's micro-batches
    before they share the examples of one: each computes batch_size examples at a time, or fewer."""
    at_once = math.gcd(accumulation, mesh.shape["data"] * mesh.shape["fsdp"])
    return accumulation // at_once, at_once * batch_size


def partition_spec(path: tuple, leaf: jax.Array | jax.ShapeDtypeStruct) -> P:
    """The axes that shard a parameter, or the optimizer's array of the same name."""
    module, name = [getattr(key, "key", None) for key in (None, *path)][-2:]
    if name == "kernel":  # into a branch the columns are heads or hidden units, out of it the rows are
        axes = ("tensor", "fsdp") if module == "c_proj" else ("fsdp", "tensor")
        return P(*[None] * (leaf.ndim - 2), *axes)  # of stacked layers, the first dimension is the layer
    return P(None, "fsdp") if name in ("wte", "wpe") else P()  # GPT-2's vocabulary has no useful divisor


def shapes_on(mesh: Mesh, init: Callable, *args: Any) -> Any:
    """The shapes and shardings of what init(*args) returns: parameters or an optimizer state."""

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, partition_spec(path, leaf))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(init, *args))


def init_sharded(like: Any, init: Callable, *args: Any) -> Any:
    """init(*args), of which each device computes its own shards."""
    return jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))(*args)


def jit_on(mesh: Mesh, f: Callable, *args: Any) -> Callable:
    """f jitted; what it returns for such args is sharded by its names."""
    return jax.jit(f, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes_on(mesh, f, *args)))


def shard(tree: Any, like: Any) -> Any:
    """Whole arrays, sharded over the devices."""
    return jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, like))


# --- in jitted functions


def has_mesh() -> bool:
    return not jax.sharding.get_abstract_mesh().empty


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Shards each dimension of x over the axes named for it. Without a mesh, x as it is."""
    return lax.with_sharding_constraint(x, P(*axes)) if has_mesh() else x


def constrain_state(tree: Any) -> Any:
    """Shards parameters, gradients or the optimizer state as shapes_on does."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: constrain(leaf, *partition_spec(path, leaf)), tree)


def map_shards(f: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """f of each device's shards. Without a mesh, f of the whole arrays."""
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False) if has_mesh() else f


def sum_over_devices(x: jax.Array) -> jax.Array:
    """In a function that map_shards maps."""
    return lax.psum(x, AXES) if has_mesh() else x


def max_over_processes(mesh: Mesh, number: int) -> jax.Array:
    """The largest of the processes' numbers, as an array that is not waited for."""
    per_device = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, P(AXES)), lambda _: np.array([number], np.int32)
    )
    return _max(per_device)


@jax.jit
def _max(numbers: jax.Array) -> jax.Array:
    return constrain(numbers.max())
