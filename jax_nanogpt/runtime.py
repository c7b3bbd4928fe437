"""Devices, the processes of a group, signals, the compilation cache, and what this CPU can do."""

import hashlib
import os
import platform
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NoReturn

import jax
from jax._src import distributed  # for its client, as Orbax does: the public module has no way to tell the others

DEVICES = ("auto", "cpu", "gpu", "tpu")
CPUINFO = Path("/proc/cpuinfo")
THREADS_PER_DEVICE = 32  # where there are several CPU devices
CACHE_BYTES = 2**30


# --- the compilation cache


def cpu_kind() -> str:
    """The same for CPUs that run the same programs: XLA compiles for the model and its instructions."""
    first = CPUINFO.read_text(encoding="utf-8").split("\n\n")[0] if CPUINFO.exists() else platform.processor()
    keys = "vendor_id|cpu family|model|model name|flags|CPU implementer|CPU architecture|CPU variant|CPU part|Features"
    kind = re.findall(rf"^(?:{keys})\s*:.*", first, re.MULTILINE) or [first]
    return f"{platform.machine()}-{hashlib.sha256(''.join(kind).encode()).hexdigest()[:12]}"


def cache_homes() -> Iterator[Path]:
    """The user's folder, then a temporary one, which nobody else may write to: JAX runs what it finds there."""
    with suppress(RuntimeError):  # a user without a name or HOME, as in a container
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    temporary = Path(tempfile.gettempdir(), f"cache-{os.getuid()}")
    with suppress(FileExistsError):
        temporary.mkdir(mode=0o700)
    if temporary.stat().st_uid == os.getuid():
        yield temporary


def use_compilation_cache() -> None:
    """Compile once per kind of machine, not once per run. JAX's own variables take precedence."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    for home in cache_homes():
        folder = home / "jax_nanogpt" / cpu_kind()
        with suppress(OSError):  # a read-only home
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                break
    else:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    with suppress(FileNotFoundError):  # another process deletes them too
        delete_old_entries(folder)
    delete_damaged_entries(folder)


def delete_old_entries(folder: Path) -> None:
    """Keeps CACHE_BYTES of those read last. JAX's own limit asks for the name of the files' owner, which the user of a
    container may lack: then it would cache nothing."""
    found = [(entry.stat().st_atime, entry.stat().st_size, entry) for entry in folder.glob("*-cache")]
    kept = 0
    for _, size, entry in sorted(found, reverse=True):
        kept += size
        if kept > CACHE_BYTES:
            entry.unlink(missing_ok=True)


def delete_damaged_entries(folder: Path) -> None:
    """JAX warns of a cache entry that it could not write or read, and keeps it: it would warn and recompile in every
    run. The warning is the only notice of it, so that this hook deletes the entry in its place."""
    show = warnings.showwarning

    def showwarning(message: Warning | str, *args: object, **kwargs: object) -> None:
        damaged = re.match("Error (?:reading|writing) persistent compilation cache entry for '(.+?)'", str(message))
        if not damaged:
            return show(message, *args, **kwargs)
        for entry in folder.glob(f"{damaged[1]}-*-cache"):
            entry.unlink(missing_ok=True)

    warnings.showwarning = showwarning


# --- devices


def start_enough_threads() -> None:
    """XLA's CPU client starts as many threads as there are cores or devices. Each collective blocks one thread per
    device, and several collectives run at once: four devices on two cores deadlocked. XLA reads the number of threads
    from PJRT_NPROC when the first device is used."""
    counts = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    devices = int(counts[-1]) if counts else 1
    if devices > 1 or jax.distributed.is_initialized():
        os.environ.setdefault("PJRT_NPROC", str(max(THREADS_PER_DEVICE * devices, os.cpu_count() or 1)))


def use_deterministic_ops() -> None:
    """The same bits in every run on an NVIDIA GPU. XLA reads its flags when the first device is used."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()


def choose_devices(name: str) -> list[jax.Device]:
    """All devices of a kind, which becomes JAX's default; auto is the best kind that JAX finds here."""
    if name not in DEVICES:
        raise ValueError(f"--device must be one of {', '.join(DEVICES)}, got {name!r}")
    use_compilation_cache()
    start_enough_threads()
    if name == "cpu":
        jax.config.update("jax_platforms", "cpu")  # else JAX would start every GPU too, and take its memory
    try:
        devices = jax.devices(None if name == "auto" else name)
    except RuntimeError:
        raise ValueError(f"--device must be one that JAX finds here ({jax.default_backend()}), got {name!r}") from None
    jax.config.update("jax_default_device", jax.local_devices(backend=devices[0].client.platform)[0])
    return devices


def default_device() -> jax.Device:
    """The device that choose_devices has chosen, or JAX's own choice."""
    return jax.config.jax_default_device or jax.local_devices()[0]


# --- the processes of a group

HEARTBEAT_TIMEOUT_S = 30  # after it JAX ends all processes if one hangs
POLL_S = 1
LOST = re.compile("gloo|nccl|coordination|heartbeat|barrier|peer", re.IGNORECASE)  # in the errors of a lost process
FAILED = "failed"  # in the key-value store that process 0 keeps for all: the number of a process that has failed
leaving, finished = threading.Lock(), threading.Event()


def init_distributed(coordinator: str, num_processes: int, process_id: int) -> None:
    """Makes this process one of several. coordinator is host:port, where process 0 listens, or auto: then JAX reads
    all three from Slurm, Open MPI, a TPU pod or its own variables (JAX_COORDINATOR_ADDRESS and so on)."""
    given = () if coordinator == "auto" else (coordinator, num_processes, process_id)
    try:
        jax.distributed.initialize(*given, initialization_timeout=120, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the processes did not connect through coordinator {coordinator!r}: {reason}") from None
    watcher.start()


def is_main_process() -> bool:
    """Whether this process prints, and writes the files that are written once."""
    return jax.process_index() == 0


def process_name() -> str:
    """Before a message of one of several; unlike jax.process_index() it starts no device."""
    state = distributed.global_state
    return f"process {state.process_id} of {state.num_processes}: " if jax.distributed.is_initialized() else ""


def leave_with_others() -> None:
    """Ends this process soon after another one has failed. A collective would wait for that one: on a GPU forever."""
    client = distributed.global_state.client
    while not finished.wait(POLL_S):
        with suppress(jax.errors.JaxRuntimeError):  # NOT_FOUND; and where process 0 is lost, JAX ends this one
            number = client.key_value_try_get(FAILED)
            time.sleep(POLL_S)  # this one may be about to report a failure of its own
            leave(1, f"process {number} has failed; restart all with --init_from=resume")


watcher = threading.Thread(target=leave_with_others, daemon=True)


def leave(status: int, message: str = "") -> NoReturn:
    """Ends this process of a group at once and tells the others. Python's own exit would wait for them in JAX's
    shutdown, for minutes."""
    leaving.acquire()  # never released: of two threads the first one speaks
    if message:
        print(f"{process_name()}{message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    state = distributed.global_state
    with suppress(jax.errors.JaxRuntimeError):
        state.client.key_value_set(FAILED, str(state.process_id))  # unless another one was the first
    if state.process_id == 0:
        time.sleep(3 * POLL_S)  # it is the one that answers the others
    os._exit(status)


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective or a barrier failed, in JAX or below Orbax."""
    return jax.distributed.is_initialized() and LOST.search(str(error)) is not None


def leave_group(error: BaseException) -> NoReturn:
    """Ends this process of several with a line or a traceback of its own, and then the others."""
    if isinstance(error, SystemExit):
        status, message = (error.code, "") if isinstance(error.code, int) else (1, str(error.code))
    elif is_lost_contact(error):
        reason = str(error).splitlines()[0]
        lost = "lost contact with another process; restart all with --init_from=resume"
        status, message = 1, f"{lost} ({reason:.200})"
    else:
        traceback.print_exception(error)
        status, message = 1, ""
    leave(status, message)


def finish() -> None:
    """Waits for the other processes of a group, at the end of a run."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
        finished.set()
        watcher.join()


# --- signals


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Yields a list of the SIGINT and SIGTERM caught so far. The second of a kind ends the process."""
    caught = []

    def catch(number: int, _: object) -> None:
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- this machine


@cache
def has_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions that XLA may use: --xla_cpu_max_isa is the best it may."""
    words = CPUINFO.read_text(encoding="utf-8").split() if CPUINFO.exists() else ()
    allowed = re.findall(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    if allowed and not re.match("AVX512_BF16|AMX", allowed[-1], re.IGNORECASE):
        return False
    return "amx_bf16" in words or "avx512_bf16" in words


def describe(devices: Sequence[jax.Device], dtype: str = "float32") -> str:
    """For the first line of output: the devices, JAX's version, and whether bfloat16 takes the slow path."""
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    plain = devices[0].platform == "cpu" and dtype == "bfloat16" and not has_bfloat16()
    note = " (no bfloat16 instructions: plain path)" if plain else ""
    return f"{count}{devices[0].device_kind}: jax {jax.__version__}{note}"
