"""Nothing that a user may have downloaded is unpickled or executed, and every text file names its encoding."""

import ast

import pytest
from house import ROOT, files, projects

UNPICKLE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
EXECUTE = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "numpy.loads"}
PROGRAMS = {"torch.jit.load", "onnxruntime.InferenceSession"}  # what they load is a program
# each behind a SHA-256, but for the second, which makes the program that the first loads
LOAD_PROGRAMS = {"neuron_nanogpt/compiler.py", "qaic_gpt2/runtime.py", "qaic_gpt2/compiler.py"}
TEXT = {"read_text", "write_text"}


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
        mode = node.args[1] if name == "open" and len(node.args) > 1 else keywords.get("mode")
        binary = "b" in str(getattr(mode, "value", ""))
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        texts = method in TEXT and len(node.args) < (2 if method == "write_text" else 1)
        if (texts or (name == "open" and not binary)) and "encoding" not in keywords:
            yield node.lineno, f"{name or method} names no encoding"


def sources(*folders):
    return [path for path in files(ROOT) if path.suffix == ".py" and path.parts[0] in folders]


@pytest.mark.parametrize("path", sources("shared", *projects(ROOT)), ids=str)
def test_nothing_is_unpickled_or_executed_and_encodings_are_named(path):
    found = [f"{path}:{line} {what}" for line, what in findings((ROOT / path).read_text(encoding="utf-8"))]
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
        ("Path('x').read_text()", "read_text names no encoding"),
        ("Path('x').write_text('y')", "write_text names no encoding"),
    ],
)
def test_each_breach_is_found(code, what):
    assert any(found.endswith(what) for _, found in findings(code))


def test_what_is_allowed_is_not_found():
    code = "open('x', 'rb')\nmodel.eval()\nPath('x').read_text('utf-8')\nPath('x').write_text('y', encoding='utf-8')"
    assert not [*findings(code)]
