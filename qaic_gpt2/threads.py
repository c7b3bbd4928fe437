"""How many threads onnxruntime takes, and where they may run.

A thread inherits the cores of the one that starts it. With OMP_PROC_BIND, PyTorch's OpenMP binds the thread that
imports torch to one core; its list of places says which cores the process has.
"""

import ctypes
import os
import re
from contextlib import contextmanager
from pathlib import Path

OPENMP = re.compile(r"\S+/lib(?:gomp|iomp5|omp)\b[^/\s]*$", re.M)  # a library in /proc/self/maps


def thread_count() -> int:
    """OMP_NUM_THREADS if it is a number, else the cores that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(wanted) if wanted.isdecimal() and int(wanted) else len(usable_cores())


def usable_cores() -> set[int]:
    cores = {*os.sched_getaffinity(0)}
    if os.environ.get("OMP_PROC_BIND", "false").lower() != "false":
        for path in {*OPENMP.findall(Path("/proc/self/maps").read_text(encoding="utf-8"))}:
            cores |= openmp_cores(ctypes.CDLL(path))
    return cores


def openmp_cores(library: ctypes.CDLL) -> set[int]:
    cores = set()
    for place in range(library.omp_get_num_places()):
        ids = (ctypes.c_int * library.omp_get_place_num_procs(place))()
        library.omp_get_place_proc_ids(place, ids)
        cores |= {*ids}
    return cores


@contextmanager
def on_usable_cores():
    """Threads that start here may run on all of them."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, usable_cores())
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
