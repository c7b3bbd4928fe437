"""Nothing that a user may have downloaded is unpickled or executed; what is text names its encoding on every system."""

import ast

import pytest

from tests.conventions.rules import ROOT, files, projects

UNPICKLE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
EXECUTE = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "numpy.loads"}
PROGRAMS = {"torch.jit.load", "onnxruntime.InferenceSession"}  # what they load is a program
# each behind a SHA-256, but for the second, which makes the program that the first loads
LOAD_PROGRAMS = {"neuron_nanogpt/compiler.py", "qaic_gpt2/runtime.py", "qaic_gpt2/compiler.py"}
TEXT = {"read_text", "write_text"}
POSIX_MODULES = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}
POSIX_NAMES = {"os.fork", "os.geteuid", "os.killpg", "os.mkfifo", "os.rename", "signal.SIGALRM", "signal.SIGKILL"}


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def findings(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {getattr(node, "module", None) or "", *(alias.name for alias in node.names)}
            for name in sorted({name.partition(".")[0] for name in names} & UNPICKLE):
                yield node.lineno, f"imports {name}"
        if not isinstance(node, ast.Call):
            continue
        name, keywords = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        if name in EXECUTE or name.rpartition(".")[2] in ("read_pickle", "unsafe_load"):
            yield node.lineno, f"calls {name}"
        for flag in ("allow_pickle", "trust_remote_code"):
            if flag in keywords and getattr(keywords[flag], "value", None) is not False:
                yield node.lineno, f"passes {flag}"


def unnamed_encodings(code):
    """Calls that read or write text in whatever encoding the system prefers, which Windows has of its own."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        method = node.func.attr if isinstance(node.func, ast.Attribute) else name
        place = 1 if name == "open" else 0  # of the mode, behind the path or in Path.open
        mode = node.args[place] if len(node.args) > place else keywords.get("mode")
        opens = method == "open" and name != "os.open" and "b" not in str(getattr(mode, "value", ""))
        texts = method in TEXT and len(node.args) < (2 if method == "write_text" else 1)
        runs = name.startswith("subprocess.") and {"text", "universal_newlines"} & keywords.keys()
        if (opens or texts or runs) and "encoding" not in keywords:
            yield node.lineno, f"{name or method} names no encoding"


def posix(code):
    """What Windows does not have, or does in another way: os.rename refuses to replace a file there."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {getattr(node, "module", None) or "", *(alias.name for alias in node.names)}
            yield from ((node.lineno, f"imports {name}") for name in sorted(names & POSIX_MODULES))
        elif isinstance(node, ast.Attribute) and dotted(node) in POSIX_NAMES:
            yield node.lineno, f"uses {dotted(node)}"


def sources(*folders):
    return [path for path in files(ROOT) if path.suffix == ".py" and path.parts[0] in folders]


@pytest.mark.parametrize("path", sources("shared", *projects(ROOT)), ids=str)
def test_nothing_is_unpickled_or_executed(path):
    found = [f"{path}:{line} {what}" for line, what in findings((ROOT / path).read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_every_text_names_its_encoding():
    found = [
        f"{path}:{line} {what}"
        for path in sources("shared", "tests", *projects(ROOT))
        for line, what in unnamed_encodings((ROOT / path).read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_shared_and_its_tests_use_what_every_system_has():
    paths = [path for path in sources("shared", "tests") if {"shared", "conftest.py"} & {*path.parts[:2]}]
    assert len(paths) >= 7
    found = [
        f"{path}:{line} {what}" for path in paths for line, what in posix((ROOT / path).read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_programs_are_loaded_in_the_places_that_check_them():
    found = set()
    for path in sources("shared", *projects(ROOT)):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        if PROGRAMS & {dotted(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}:
            found.add(path.as_posix())
    assert found == LOAD_PROGRAMS


@pytest.mark.parametrize(
    "code, what",
    [
        ("import pickle", "imports pickle"),
        ("from joblib import load", "imports joblib"),
        ("import torch\ntorch.load('x')", "calls torch.load"),
        ("exec(open('x', encoding='utf-8').read())", "calls exec"),
        ("import numpy\nnumpy.load('x', allow_pickle=True)", "passes allow_pickle"),
        ("AutoModel.from_pretrained('x', trust_remote_code=flag)", "passes trust_remote_code"),
        ("open('x')", "open names no encoding"),
        ("open('x', mode='w')", "open names no encoding"),
        ("Path('x').open('w')", "open names no encoding"),
        ("path.open()", "open names no encoding"),
        ("Path('x').read_text()", "read_text names no encoding"),
        ("Path('x').write_text('y')", "write_text names no encoding"),
        ("subprocess.run(['x'], text=True)", "subprocess.run names no encoding"),
        ("import fcntl", "imports fcntl"),
        ("from resource import getrusage", "imports resource"),
        ("os.rename('x', 'y')", "uses os.rename"),
        ("signal.signal(signal.SIGALRM, stop)", "uses signal.SIGALRM"),
    ],
)
def test_each_breach_is_found(code, what):
    assert any(found.endswith(what) for _, found in [*findings(code), *unnamed_encodings(code), *posix(code)])


def test_what_is_allowed_is_not_found():
    code = (
        "open('x', 'rb')\nmodel.eval()\nPath('x').read_text('utf-8')\nPath('x').write_text('y', encoding='utf-8')\n"
        "path.open('wb')\nos.open('x', os.O_RDONLY)\nsubprocess.run(['x'], encoding='utf-8')\nos.replace('x', 'y')"
    )
    assert not [*findings(code), *unnamed_encodings(code), *posix(code)]
