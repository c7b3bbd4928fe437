"""Where the work runs."""

import jax

NAMES = ("auto", "cpu", "gpu", "tpu")


def choose_devices(name):
    """All devices of a kind, made the default; auto is the best kind that JAX finds here."""
    if name not in NAMES:
        raise ValueError(f"device is {name}, one of {', '.join(NAMES)} is expected")
    try:
        devices = jax.devices(None if name == "auto" else name)
    except RuntimeError:
        raise ValueError(f"device is {name}, but JAX finds only: {jax.default_backend()}") from None
    jax.config.update("jax_default_device", devices[0])
    return devices


def describe(devices):
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    return f"{count}{devices[0].device_kind}: jax {jax.__version__}"
