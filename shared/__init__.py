"""What the four projects have in common: how a script starts and ends, the tokenizer (which also finds the model), and
sampling."""

import io
import os
import re
import signal
import sys
import threading
from functools import partial, wraps

FIRST, LAST = (3, 11), (3, 13)  # the Pythons that every pin of every project has a wheel for, on a CPU


def start_script(name):
    """What a script, by its __name__, does before it imports packages, so that three things end in no traceback.

    On a Python that its packages are not made for it ends in one line; scripts, and this file, are written so that
    Python 3.8 can still read them this far. Ctrl-C ends in one line also while packages are imported, which takes
    seconds. And a character that the console lacks is printed as its escape.
    """
    if not FIRST <= sys.version_info[:2] <= LAST:
        found, first, last = (".".join(map(str, version[:3])) for version in (sys.version_info, FIRST, LAST))
        print(f"Python is {found}, {first} to {last} is expected", file=sys.stderr)
        sys.exit(2)
    if name == "__main__":
        signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")


def fail(message):
    """What every user's mistake ends in: one line on stderr, whatever was in the message, and exit status 2."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(message))
    print(line if len(line) < 2000 else f"{line[:1000]} ... {line[-1000:]}", file=sys.stderr)
    sys.exit(2)


def script(run):
    """run(argv) as a script's main(argv=None), which ends well, or in one line that says why not."""

    @wraps(run)
    def main(argv=None):
        alone = run.__module__ == "__main__"  # else a test called it, whose own Ctrl-C it is
        if alone:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.unraisablehook = partial(interrupt_again, sys.unraisablehook)
        try:
            for word in sys.argv[1:] if argv is None else argv:
                if re.fullmatch("--[^=]+=--", word):  # of which argparse makes an empty list, until Python 3.13
                    fail(f"{word}: -- is no value")
            return run(argv)
        except BrokenPipeError:  # the reader has seen enough, as in `| head`; what is left must not be flushed there
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (ValueError, OSError, ImportError) as error:
            fail(error)
        except (MemoryError, RuntimeError) as error:  # an engine's own word for it is a RuntimeError
            if not (isinstance(error, MemoryError) or re.search("RESOURCE_EXHAUSTED|allocate memory", str(error))):
                raise
            fail(f"there is not enough memory ({str(error).partition(chr(10))[0]:.200})")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            if alone:
                os._exit(130)  # Python's own end waits for threads that load, or crashes under those that compute
            sys.exit(130)
        finally:
            if alone:  # all is done, but for Python's own end, which an exception would only disturb
                signal.signal(signal.SIGINT, signal.SIG_IGN)

    return main


def interrupt_again(otherwise, ignored):
    """Python ignores a Ctrl-C that falls into a destructor, or into JAX's callback of the garbage collector."""
    if ignored.exc_type is KeyboardInterrupt:
        threading.Timer(0.01, os.kill, [os.getpid(), signal.SIGINT]).start()
    else:
        otherwise(ignored)
