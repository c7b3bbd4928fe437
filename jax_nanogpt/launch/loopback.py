"""Run train.py in several processes on this machine, as a cluster does on several machines.

    python launch/loopback.py 2 config/train_pydoc_char.py [--key=value ...]

When one fails, the others are ended. Ctrl-C and SIGTERM are passed on: the processes save and stop together.
"""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
GRACE_S = 5  # for the others to notice and report that one is gone


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def kill_all(processes):
    end = time.monotonic() + GRACE_S
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.wait()


def main(argv=None):
    count, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if not (count.isascii() and count.isdigit() and int(count)):
        print(f"the number of processes must be 1 or more, got {count!r}", file=sys.stderr)
        return 2
    count, where = int(count), f"--coordinator=127.0.0.1:{free_port()}"
    processes = []
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda number, _: [process.send_signal(number) for process in processes])
    for i in range(count):
        command = [sys.executable, TRAIN, *flags, where, f"--num_processes={count}", f"--process_id={i}"]
        processes.append(subprocess.Popen(command, start_new_session=True))  # else a Ctrl-C would come twice
    statuses = [None]
    while None in statuses and not any(statuses):
        time.sleep(0.1)
        statuses = [process.poll() for process in processes]
    if not any(statuses):
        return 0
    failed = next(i for i, status in enumerate(statuses) if status)
    kill_all(processes)
    status = statuses[failed]
    reason = f"signal {-status}" if status < 0 else f"status {status}"
    if status not in (2, 130):  # train.py has printed a message
        print(f"\nprocess {failed} of {count} ended with {reason}; the others were ended", file=sys.stderr)
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main())
