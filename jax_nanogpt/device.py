"""Where the work runs, and where XLA's results are kept."""

import os
import platform
import re
import warnings
from functools import cache
from pathlib import Path

import jax

NAMES = ("auto", "cpu", "gpu", "tpu")
LOST_S = 30  # without a sign of life, after which a process is given up
CPUINFO = Path("/proc/cpuinfo")
THREADS = 32  # for each of several CPU devices


def keep_compiled():
    """Compile once a machine, not once a run. JAX's own variables come first, JAX_ENABLE_COMPILATION_CACHE=0 too."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        # by host: what is compiled for one machine's CPU is not for another's that shares the home folder
        folder = home / "jax_nanogpt" / platform.node()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return  # a home that cannot be written
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
            forget_damaged(folder)


def forget_damaged(folder):
    """JAX leaves what it could not write or read whole, and would warn of it in every run; gone, it is made anew."""
    show = warnings.showwarning

    def look(message, *rest, **more):
        damaged = re.match("Error (?:reading|writing) persistent compilation cache entry for '(.+?)'", str(message))
        if not damaged:
            return show(message, *rest, **more)
        for entry in folder.glob(f"{damaged[1]}-*-cache"):
            entry.unlink(missing_ok=True)

    warnings.showwarning = look


def take_enough_threads():
    """XLA's CPU client starts as many threads as there are cores or devices. Each collective blocks one thread per
    device, and several collectives run at once: four devices on two cores deadlocked. PJRT_NPROC is XLA's variable for
    the number of threads, read when the first device is asked for."""
    counts = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    devices = int(counts[-1]) if counts else 1
    if devices > 1 or jax.distributed.is_initialized():
        os.environ.setdefault("PJRT_NPROC", str(max(THREADS * devices, os.cpu_count() or 1)))


def choose_devices(name):
    """All devices of a kind, made the default; auto is the best kind that JAX finds here."""
    keep_compiled()
    take_enough_threads()
    if name not in NAMES:
        raise ValueError(f"device is {name}, one of {', '.join(NAMES)} is expected")
    try:
        devices = jax.devices(None if name == "auto" else name)
    except RuntimeError:
        raise ValueError(f"device is {name}, but JAX finds only: {jax.default_backend()}") from None
    jax.config.update("jax_default_device", jax.local_devices(backend=devices[0].client.platform)[0])
    return devices


def join(coordinator, num_processes, process_id):
    """Makes this process one of several. coordinator is host:port, where process 0 listens, or auto: then JAX asks
    Slurm, Open MPI, a TPU pod or its own variables (JAX_COORDINATOR_ADDRESS and so on) for all three."""
    known = () if coordinator == "auto" else (coordinator, num_processes, process_id)
    try:
        jax.distributed.initialize(*known, initialization_timeout=120, heartbeat_timeout_seconds=LOST_S)
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"coordinator is {coordinator}, where the processes do not find each other: {first}") from None


def leads():
    """Whether this process is the one that prints, and writes what is written once."""
    return jax.process_index() == 0


@cache
def has_bfloat16():
    """Whether this CPU multiplies bfloat16, and XLA may let it: --xla_cpu_max_isa names the best that it may use."""
    words = CPUINFO.read_text(encoding="utf-8").split() if CPUINFO.exists() else ()
    allowed = re.findall(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    if allowed and not re.match("AVX512_BF16|AMX", allowed[-1], re.IGNORECASE):
        return False
    return "amx_bf16" in words or "avx512_bf16" in words


def describe(devices, dtype="float32"):
    """For the first line of output: the devices, JAX's version, and what is slower here than it may seem."""
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    plain = devices[0].platform == "cpu" and dtype == "bfloat16" and not has_bfloat16()
    note = " (no bfloat16 instructions: plain path)" if plain else ""
    return f"{count}{devices[0].device_kind}: jax {jax.__version__}{note}"
