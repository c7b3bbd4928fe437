"""Several processes of train.py on this machine, as a cluster would have them on several.

    python launch/loopback.py 2 config/train_pydoc_char.py [--key=value ...]

The first that fails ends them all. Ctrl-C and SIGTERM are passed on: the processes save, and stop together.
"""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
GRACE_S = 5  # for the others to find out, and say, that one is gone


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main(argv=None):
    count, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if not (count.isascii() and count.isdigit() and int(count)):
        print(f"the number of processes is {count!r}, 1 or more is expected", file=sys.stderr)
        return 2
    count, where = int(count), f"--coordinator=127.0.0.1:{free_port()}"
    processes = []
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda number, _: [process.send_signal(number) for process in processes])
    for i in range(count):
        command = [sys.executable, TRAIN, *flags, where, f"--num_processes={count}", f"--process_id={i}"]
        processes.append(subprocess.Popen(command, start_new_session=True))  # else a Ctrl-C would come twice
    ended = [None]
    while None in ended and not any(ended):
        time.sleep(0.1)
        ended = [process.poll() for process in processes]
    if not any(ended):
        return 0
    failed = next(i for i, status in enumerate(ended) if status)
    end = time.monotonic() + GRACE_S
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.wait()
    status = ended[failed]
    how = f"signal {-status}" if status < 0 else f"status {status}"
    if status not in (2, 130):  # these have said it themselves
        print(f"\nprocess {failed} of {count} ended with {how}, and so all did", file=sys.stderr)
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main())
