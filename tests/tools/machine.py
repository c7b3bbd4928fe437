"""The machine that a benchmark runs on: its CPU, memory bandwidth and multiplication rate, and other work on it."""

import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

CPU_INFO, CPU_TIMES = Path("/proc/cpuinfo"), Path("/proc/stat")
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best(call: Callable, times: int = 10) -> float:
    took = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return min(took)


def bandwidth(floats: int = 2**26) -> float:
    """Bytes/s that all cores read together, as STREAM counts them: the best of three ways to read 256 MB of float32."""
    parts = np.array_split(np.ones(floats, np.float32), cores())
    matrix, vector = np.ones((floats // 2**13, 2**13), np.float32), np.ones(2**13, np.float32)
    with ThreadPoolExecutor(cores()) as pool:
        reads = [lambda: list(pool.map(np.max, parts)), lambda: list(pool.map(np.dot, parts, parts))]
        return 4 * floats / min(map(best, [*reads, lambda: matrix @ vector]))


def multiply_rate(side: int = 2048) -> float:
    """FLOP/s in float32."""
    square = np.random.default_rng(0).random((side, side), np.float32)
    return 2 * side**3 / best(lambda: square @ square, 5)


def about() -> dict:
    info = CPU_INFO.read_text(encoding="utf-8") if CPU_INFO.exists() else ""
    names = re.findall(r"^model name\s*: (.*)$", info, re.M)
    flags = {word for line in re.findall(r"^(?:flags|Features)\s*: (.*)$", info, re.M) for word in line.split()}
    return {
        "cpu": names[0] if names else "unknown",
        "cores": cores(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "date": time.strftime("%Y-%m-%d"),
        "bandwidth": round(bandwidth()),
        "float32": round(multiply_rate()),
    }


def share_used(seconds: float = 1.0) -> float:
    """The part of the CPUs' time that is used, by this machine's work or by the host's, while this process sleeps."""
    before = cpu_times()
    time.sleep(seconds)
    spent = [now - then for now, then in zip(cpu_times(), before, strict=True)]
    return 1 - sum(spent[3:5]) / max(1, sum(spent))  # idle, and waiting for a disk


def cpu_times() -> list[int]:
    """User, nice, system, idle, iowait, ...; zeros where the system does not tell."""
    if not CPU_TIMES.exists():
        return [0, 0, 0, 1, 0]
    return [*map(int, CPU_TIMES.read_text(encoding="ascii").partition("\n")[0].split()[1:9])]
