"""Run train.py in several processes on this machine, as a cluster does on several machines.

    python launch/loopback.py 2 config/train_pydoc_char.py [--key=value ...]

The processes share the machine's NVIDIA GPUs equally. When one fails, the others are ended. Ctrl-C and SIGTERM are
passed on: the processes save and stop together.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
DEVICE_FILES = Path("/dev")
GRACE_S = 5  # for the others to notice and report that one has failed


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def visible_gpus() -> list[str]:
    """The numbers that CUDA gives them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = map(str, range(len(list(DEVICE_FILES.glob("nvidia[0-9]*")))))
    return list(found) if given is None else [name for name in given.split(",") if name]


def shares(gpus: list[str], count: int) -> list[dict[str, str]]:
    """The environment variables of each process: JAX takes all GPUs that it sees, and NCCL refuses one taken twice."""
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i::count])} if gpus else {} for i in range(count)]


def commands(count: int, flags: list[str]) -> list[list[str | Path]]:
    command = [sys.executable, TRAIN, *flags, f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
    return [[*command, f"--process_id={i}"] for i in range(count)]


def wait(processes: list[subprocess.Popen]) -> tuple[int, int]:
    """(the process that failed, its status), or (0, 0). The others have ended by then."""
    statuses, end = [None], float("inf")
    while None in statuses and time.monotonic() < end:
        time.sleep(0.1)
        statuses = [process.poll() for process in processes]
        if any(statuses):
            end = min(end, time.monotonic() + GRACE_S)
    for process in processes:
        process.kill()
        process.wait()
    failed = [(i, status) for i, status in enumerate(statuses) if status]
    # a status of 1 may only mean that another process has failed
    return next((pair for pair in failed if pair[1] != 1), (failed or [(0, 0)])[0])


def main(argv: list[str] | None = None) -> int:
    count, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if not (count.isascii() and count.isdigit() and int(count)):
        print(f"the number of processes must be 1 or more, got {count!r}", file=sys.stderr)
        return 2
    count, gpus = int(count), visible_gpus()
    if "--device=cpu" in flags:
        gpus = []
    if gpus and count > len(gpus):
        allowed = f"at most {len(gpus)}, one per GPU, or any with --device=cpu"
        print(f"the number of processes must be {allowed}, got {count}", file=sys.stderr)
        return 2
    processes: list[subprocess.Popen] = []
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda number, _: [process.send_signal(number) for process in processes])
    for command, variables in zip(commands(count, flags), shares(gpus, count), strict=True):
        # in a session of its own, else a Ctrl-C would come twice
        processes.append(subprocess.Popen(command, start_new_session=True, env=os.environ | variables))
    failed, status = wait(processes)
    if status not in (0, 2, 130):  # of 2 and 130 train.py has printed a message
        reason = f"signal {-status}" if status < 0 else f"status {status}"
        print(f"\nprocess {failed} of {count} ended with {reason}; the others were ended", file=sys.stderr)
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main())
