"""Bad input for every script of one project, by the python of its environment; tests/contract/fuzz.py asks all of them.

    .tox/jax/bin/python tests/contract/fuzz_run.py jax_nanogpt EMPTY_FOLDER --seed=1 [--only=17]

A script is any file with a `main(argv=None)`. Each case (fuzz_input.py draws them) must end in exit status 0, or in 2
with one line on stderr, in time, with nothing half-written and nothing executed of what it read. A file that is cut is
refused, or makes the same text as the whole. Scripts run in this process, from a copy of the project, in a folder made
anew for each case; some run as processes, whose words are bytes. The last line of output is JSON.
"""

import argparse
import faulthandler
import importlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from safetensors.numpy import save_file

from tests.contract.fuzz_input import SPOIL, Payload, any_case, cuts, drawn, flags_of, found, good_words, named
from tests.conventions.rules import ROOT, example_of

LONG_S = 4  # for a case that asks for a lot: Ctrl-C must end it
MEMORY = 16 * 2**30
# where minutes of work begin: the input was good
HEAVY = ("Report", "Peer", "trainer", "pydoc_topics", "bits", "free_port")
LIBRARIES = {"tmp/torchinductor_root"}  # what they keep, whole
UNFINISHED = re.compile(r"\.part$|\.tmp|-tmp|^\.|\.json\.\d+$")


# -- a case's folder


def make_model(folder):
    """A random GPT-2 of two small layers, with gpt2-nano's tokenizer."""
    folder.mkdir()
    nano = ROOT / "checkpoints" / "gpt2-nano"
    for name in "vocab.json", "merges.txt":
        shutil.copy(nano / name, folder)
    config = json.loads((nano / "config.json").read_text(encoding="utf-8"))
    config |= {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = {
        "wte.weight": (config["vocab_size"], 32),
        "wpe.weight": (32, 32),
        "ln_f.weight": (32,),
        "ln_f.bias": (32,),
    }
    for layer in "h.0", "h.1":
        matrices = {"attn.c_attn": (32, 96), "attn.c_proj": (32, 32), "mlp.c_fc": (32, 128), "mlp.c_proj": (128, 32)}
        for name, shape in ({"ln_1": (32,), "ln_2": (32,)} | matrices).items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[-1:]}
    draw = np.random.default_rng(0)
    tensors = {f"transformer.{name}": draw.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def make_files(folder):
    """What a case finds before anything is spoilt."""
    for name in "tmp", "executables", "dataset":
        (folder / name).mkdir(parents=True)
    make_model(folder / "model")
    texts = {"empty": "", "text.txt": 40 * "To be, or not to be, that is the question. ", "good.py": "max_iters = 1\n"}
    texts["bad.py"] = "import os\nos.mkdir('executed')\n"
    for name, content in texts.items():
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "pickle").write_bytes(pickle.dumps(Payload()))
    (folder / "device").symlink_to(os.devnull)
    for name in "vocab.json", "merges.txt":
        shutil.copy(folder / "model" / name, folder / "dataset")
    for split in "train", "val":
        np.arange(200, dtype=np.uint16).tofile(folder / "dataset" / f"{split}.bin")


def renewed(folder, source):
    if folder.exists():
        shutil.rmtree(folder)
    return shutil.copytree(source, folder, symlinks=True)


# -- a case


def asks_for_much(words):
    return any(re.search(r"(^|=)\+?\d{4,}$", word) for word in words)


def run_here(main, words, folder, limit):
    """(status, stdout, stderr, what it changed of this process) of main(words) in folder."""
    os.chdir(folder)
    before, kept = state(), [os.dup(1), os.dup(2)]
    sys.stdout.flush()
    with open(folder.parent / "stdout", "w+b") as out, open(folder.parent / "stderr", "w+b") as err:
        for number, file in (1, out), (2, err):
            os.dup2(file.fileno(), number)
        faulthandler.dump_traceback_later(3 * limit, exit=True, file=kept[1])
        signal.setitimer(signal.ITIMER_REAL, LONG_S if asks_for_much(words) else limit)
        try:
            status = main([*words]) or 0
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
        except BaseException:
            traceback.print_exc()
            status = 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.flush()
        for number, fd in enumerate(kept, 1):
            os.dup2(fd, number)
            os.close(fd)
        changed = [name for name, value in state().items() if value != before[name]]
        restore(before)
        texts = [os.pread(file.fileno(), 2**20, 0).decode("utf-8", "replace") for file in (out, err)]
    return status, *texts, changed


def state():
    """What one run could leave to the next."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    where = os.readlink("/proc/self/cwd")
    return {"the folder": where, "os.environ": {**os.environ}, "sys.path": [*sys.path], "signal handlers": handlers}


def restore(before):
    os.chdir(before["the folder"])
    os.environ.clear()
    os.environ.update(before["os.environ"])
    sys.path[:] = before["sys.path"]
    for number, handler in before["signal handlers"].items():
        signal.signal(number, handler)


def run_process(path, words, folder, limit):
    """The same of a process. Its words are bytes, which need be no UTF-8."""

    def encoded(word):
        try:
            return os.fsencode(word[:25_000])  # the system takes 128 kB
        except UnicodeEncodeError:
            return word[:25_000].encode("utf-8", "surrogatepass")

    command = [sys.executable, path, *map(encoded, words)]
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, timeout=2 * limit)
    except subprocess.TimeoutExpired:
        return 130, "", "no end", []
    return run.returncode, *(text.decode("utf-8", "replace") for text in (run.stdout, run.stderr)), []


def complaint(case, folder, template, tokens, limit, status, stdout, stderr):
    """What is wrong with how a case ended, or nothing."""
    allowed = {0, 2} | ({130} if asks_for_much(case.words) else set())
    if "NOT as expected" in stdout or re.search(r"^the loss is .* at iteration", stderr, re.M):
        allowed.add(1)  # each an answer
    if status not in allowed:
        return f"exit status {status}" if status != 130 else f"no end in {limit} s"
    if "Traceback (most recent call last)" in stderr:
        return "a traceback"
    if status == 2 and not (stderr.strip() and stderr.count("\n") == 1):
        return f"{stderr.count(chr(10))} lines on stderr"
    before = {path.relative_to(template) for path in template.rglob("*")}
    for path in sorted({path.relative_to(folder) for path in folder.rglob("*")} - before):
        if path.name == "executed":
            return "what was in a file was executed"
        if UNFINISHED.search(path.name) or path.parts[0] == "tmp" and path.as_posix() not in LIBRARIES:
            return f"{path} is left"
    if not (folder / "device").is_symlink():
        return "a device was replaced"
    if (folder / "dump.npz").exists():
        if status:
            return "it failed, and wrote dump.npz"
        with np.load(folder / "dump.npz") as arrays:
            made = arrays["tokens"].tolist()
        if case.kind == "cuts" and made != tokens:
            return f"a file that is cut makes the tokens {made}, the whole {tokens}"
    return ""


# -- all of them


def load(root, project):
    """path -> module of each script of the project."""
    scripts = {}
    for path in sorted((root / project).rglob("*.py")):
        if "\ndef main(argv=None):" in path.read_text(encoding="utf-8"):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            scripts[path.relative_to(root / project).as_posix()] = importlib.import_module(name)
    return scripts


def prepare(root, project, scratch):
    """A copy of the project, for what scripts leave beside themselves, and the places of all that they keep."""
    case, copy = scratch / "case", scratch / "root"
    for name in project, "shared":
        left_out = shutil.ignore_patterns("__pycache__", "executables", "out*")
        shutil.copytree(root / name, copy / name, ignore=left_out)
    (copy / "checkpoints").symlink_to(ROOT / "checkpoints")
    (copy / project / "executables").symlink_to(case / "executables")
    sys.path.insert(0, str(copy))
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "hub"), "QEFF_HOME": str(case / "qeff")}
    os.environ |= {"TMPDIR": str(case / "tmp"), "JAX_COMPILATION_CACHE_DIR": str(scratch / "jax")}
    sys.stdout.reconfigure(errors="backslashreplace")  # as shared.start_script does
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    make_files(scratch / "template")
    return copy, case, scratch / "template"


def good_runs(scripts, flags, example, folder, template, limit):
    """The tokens of a good run, and the files that it, or training, made: they stay in the template."""
    runs = [(example, good_words(example, flags[example]))]
    if "train.py" in scripts:
        runs.append(("train.py", (*good_words("train.py", flags["train.py"], {"out_dir"}), "--out_dir=out")))
    for name, words in runs:
        known = {path.relative_to(template) for path in template.rglob("*")}
        status, stdout, stderr, _ = run_here(scripts[name].main, words, renewed(folder, template), limit)
        if status:
            sys.exit(f"a good run of {name} ends with exit status {status}:\n{stdout}{stderr}")
        if name == example:
            with np.load(folder / "dump.npz") as arrays:
                tokens = arrays["tokens"].tolist()
            (folder / "dump.npz").unlink()
        renewed(template, folder)
        made = sorted({path.relative_to(template) for path in template.rglob("*") if path.is_file()} - known)
    return tokens, [path.as_posix() for path in made]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("project")
    add("scratch", type=Path, help="an empty folder")
    add("--root", type=Path, default=ROOT)
    add("--cases", type=int, default=300, help="that are drawn (default: %(default)s)")
    add("--processes", type=int, default=30, help="and run as processes (default: %(default)s)")
    add("--every", type=int, default=1, help="percent, from one cut of a file to the next (default: %(default)s)")
    add("--limit", type=int, default=60, help="seconds for a case (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--only", type=int, help="the case of this number")
    args = parser.parse_args(argv)
    root, folder, template = prepare(args.root, args.project, args.scratch.resolve())
    scripts, example = load(root, args.project), example_of(root, args.project)
    flags = {name: flags_of(script) for name, script in scripts.items()}
    light = {name: flags[name] for name, script in scripts.items() if not any(hasattr(script, part) for part in HEAVY)}
    for script in scripts.values():
        for part in HEAVY:
            if hasattr(script, part):
                setattr(script, part, lambda *_, **__: sys.exit(0))
    tokens, made = good_runs(scripts, flags, example, folder, template, args.limit)

    cases = [named(case, made) for case in drawn(any_case(flags, example, made), args.cases, args.seed)]
    cases += cuts(example, flags, args.every)
    short = any_case(light, example, made).filter(lambda case: not asks_for_much(case.words))
    processes = drawn(short, args.processes, args.seed + 1)
    cases += [named(case, made)._replace(kind="processes") for case in processes]
    cases += found(example, flags, made)  # last, for their number is not the same each time
    passed, failed, notes, slowest = Counter(), Counter(), Counter(), (0, "")
    for number, case in enumerate(cases):
        if args.only not in (None, number):
            continue
        (args.scratch / "now").write_text(f"{number} {case}", encoding="utf-8")
        renewed(folder, template)
        if case.spoil:
            SPOIL[case.spoil[0]](folder, *case.spoil[1:])
        began = time.monotonic()
        if case.kind == "processes":
            *ended, changed = run_process(root / args.project / case.script, case.words, folder, args.limit)
        else:
            *ended, changed = run_here(scripts[case.script].main, case.words, folder, args.limit)
        slowest = max(slowest, (time.monotonic() - began, str(case)))
        notes.update(f"{case.script} changes {what}" for what in changed)
        if wrong := complaint(case, folder, template, tokens, args.limit, *ended):
            print(f"FAILED {args.project} {number} {case}\n  {wrong}: {ended[2][-1500:]!a}", flush=True)
        (failed if wrong else passed)[case.kind] += 1
        if args.only is not None:
            print(*ended, sep="\n")
    print(*notes.items(), f"slowest: {slowest[0]:.1f} s, {slowest[1]}", sep="\n")
    print(json.dumps({"passed": passed, "failed": failed}))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
