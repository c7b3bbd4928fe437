"""Devices and processes, the compilation cache, and what this CPU can do."""

import os
import platform
import re
import warnings
from functools import cache
from pathlib import Path

import jax

DEVICES = ("auto", "cpu", "gpu", "tpu")
HEARTBEAT_TIMEOUT_S = 30
CPUINFO = Path("/proc/cpuinfo")
THREADS_PER_DEVICE = 32  # where there are several CPU devices


def use_compilation_cache():
    """Compile once per machine, not once per run. JAX's own variables take precedence."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # one folder per host: a program compiled for one CPU may not run on another that shares the home folder
    folder = home / "jax_nanogpt" / platform.node()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a read-only home
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        delete_damaged_entries(folder)


def delete_damaged_entries(folder):
    """JAX warns of a cache entry that it could not write or read, and keeps it: it would warn and recompile in every
    run. The warning is the only notice of it, so that this hook deletes the entry in its place."""
    show = warnings.showwarning

    def showwarning(message, *args, **kwargs):
        damaged = re.match("Error (?:reading|writing) persistent compilation cache entry for '(.+?)'", str(message))
        if not damaged:
            return show(message, *args, **kwargs)
        for entry in folder.glob(f"{damaged[1]}-*-cache"):
            entry.unlink(missing_ok=True)

    warnings.showwarning = showwarning


def start_enough_threads():
    """XLA's CPU client starts as many threads as there are cores or devices. Each collective blocks one thread per
    device, and several collectives run at once: four devices on two cores deadlocked. XLA reads the number of threads
    from PJRT_NPROC when the first device is used."""
    counts = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    devices = int(counts[-1]) if counts else 1
    if devices > 1 or jax.distributed.is_initialized():
        os.environ.setdefault("PJRT_NPROC", str(max(THREADS_PER_DEVICE * devices, os.cpu_count() or 1)))


def choose_devices(name):
    """All devices of a kind, which becomes JAX's default; auto is the best kind that JAX finds here."""
    use_compilation_cache()
    start_enough_threads()
    if name not in DEVICES:
        raise ValueError(f"--device must be one of {', '.join(DEVICES)}, got {name!r}")
    try:
        devices = jax.devices(None if name == "auto" else name)
    except RuntimeError:
        raise ValueError(f"--device must be one that JAX finds here ({jax.default_backend()}), got {name!r}") from None
    jax.config.update("jax_default_device", jax.local_devices(backend=devices[0].client.platform)[0])
    return devices


def init_distributed(coordinator, num_processes, process_id):
    """Makes this process one of several. coordinator is host:port, where process 0 listens, or auto: then JAX reads
    all three from Slurm, Open MPI, a TPU pod or its own variables (JAX_COORDINATOR_ADDRESS and so on)."""
    given = () if coordinator == "auto" else (coordinator, num_processes, process_id)
    try:
        jax.distributed.initialize(*given, initialization_timeout=120, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the processes did not connect through coordinator {coordinator!r}: {reason}") from None


def is_main_process():
    """Whether this process prints, and writes the files that are written once."""
    return jax.process_index() == 0


@cache
def has_bfloat16():
    """Whether this CPU has bfloat16 instructions that XLA may use: --xla_cpu_max_isa is the best it may."""
    words = CPUINFO.read_text(encoding="utf-8").split() if CPUINFO.exists() else ()
    allowed = re.findall(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    if allowed and not re.match("AVX512_BF16|AMX", allowed[-1], re.IGNORECASE):
        return False
    return "amx_bf16" in words or "avx512_bf16" in words


def describe(devices, dtype="float32"):
    """For the first line of output: the devices, JAX's version, and whether bfloat16 takes the slow path."""
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    plain = devices[0].platform == "cpu" and dtype == "bfloat16" and not has_bfloat16()
    note = " (no bfloat16 instructions: plain path)" if plain else ""
    return f"{count}{devices[0].device_kind}: jax {jax.__version__}{note}"
