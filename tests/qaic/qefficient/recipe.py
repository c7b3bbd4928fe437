"""Makes the files beside it from QEfficient, at the commit of qaic_gpt2/requirements.txt.

    python recipe.py signatures FOLDER    from the source in FOLDER, a clone: signatures.json
    python recipe.py graphs               where QEfficient is installed: plain.onnx, functions.onnx, expected.npz

signatures.json has the keywords of QEFFAutoModelForCausalLM's methods with their defaults, as Python writes them; a
method's **kwargs are followed into the functions that take them out. The graphs are two exports of a random GPT-2, and
the logits are transformers', after each token.

`make qeff` makes them again and compares, with Python 3.11 and the packages of tests/qaic/requirements-qeff.txt.
"""

import ast
import json
import re
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

HERE = Path(__file__).parent
METHODS = ("from_pretrained", "export", "compile", "generate")
# where a method's **kwargs go: file, function
FURTHER = {
    "compile": ("base/modeling_qeff.py", "_compile"),
    "generate": ("generation/text_generation_inference.py", "cloud_ai_100_exec_kv"),
}
SHAPE = {"vocab_size": 53, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}


def function(tree: ast.AST, name: str) -> ast.FunctionDef:
    return next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)


def keywords(node: ast.FunctionDef) -> dict[str, str | None]:
    """Its parameters with their defaults, and what it takes from its **kwargs."""
    given = node.args
    names = [arg.arg for arg in given.args if arg.arg not in ("self", "cls")]
    defaults = [None] * (len(names) - len(given.defaults)) + [*map(ast.unparse, given.defaults)]
    found = dict(zip(names, defaults, strict=True))
    found |= {arg.arg: ast.unparse(value) for arg, value in zip(given.kwonlyargs, given.kw_defaults, strict=True)}
    for call in calls(node):
        taken = isinstance(call.func, ast.Attribute) and call.func.attr in ("pop", "get")
        if taken and given.kwarg and ast.unparse(call.func.value) == given.kwarg.arg:
            name, *default = call.args
            if isinstance(name, ast.Constant):
                found.setdefault(name.value, "".join(map(ast.unparse, default)) or "None")
    return found


def calls(node: ast.AST) -> list[ast.Call]:
    return [part for part in ast.walk(node) if isinstance(part, ast.Call)]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def signatures(package: Path) -> dict[str, dict[str, str | None]]:
    tree, found = parse(package / "transformers/models/modeling_auto.py"), {}
    cls = next(node for node in tree.body if getattr(node, "name", "") == "QEFFAutoModelForCausalLM")
    constants = literals(parse(package / "utils/constants.py"))
    for method in METHODS:
        node = function(cls, method)
        names = keywords(node)
        if method in FURTHER:
            file, inner = FURTHER[method]
            [call] = [call for call in calls(node) if ast.unparse(call.func).endswith(inner)]
            passed = {keyword.arg for keyword in call.keywords}  # by the method itself
            further = keywords(function(parse(package / file), inner))
            names = {name: further[name] for name in further.keys() - passed - {"tokenizer"}} | names
        if method == "compile":  # the flags of the compiler that its docstring names
            names = dict.fromkeys(re.findall(r"- (\w+) \(\w+, optional\): ", ast.get_docstring(node)), "None") | names
        public = {name: names[name] for name in sorted(names) if name.isidentifier() and name[0] != "_"}
        found[method] = {name: resolve(value, constants) for name, value in public.items()}
    return found


def literals(tree: ast.Module) -> dict[str, str]:
    """A module's constants that are literals."""
    pairs = [(node.targets[0], node.value) for node in tree.body if isinstance(node, ast.Assign)]
    return {ast.unparse(name): ast.unparse(value) for name, value in pairs if isinstance(value, ast.Constant)}


def resolve(default: str | None, constants: dict[str, str]) -> str | None:
    """A default as a literal; None for one that is computed."""
    value = constants.get(default.removeprefix("constants."), default) if default else default
    try:
        ast.literal_eval(value or "None")
    except ValueError:
        return "None"
    return value


def graphs() -> None:
    import numpy as np
    import torch
    import transformers

    sys.modules["qwen_vl_utils"] = MagicMock()  # QEfficient imports it for models with images
    from QEfficient import QEFFAutoModelForCausalLM

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are not the initial zeros and ones
            parameter += 0.1 * torch.randn_like(parameter)
        ids = torch.randint(SHAPE["vocab_size"], (2, 20))
        np.savez_compressed(HERE / "expected.npz", ids=ids.numpy(), logits=model(ids).logits.numpy())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name, options in {"plain": {}, "functions": {"use_onnx_subfunctions": True}}.items():
            exported = QEFFAutoModelForCausalLM.from_pretrained(folder).export(f"{folder}/{name}", **options)
            (HERE / f"{name}.onnx").write_bytes(Path(exported).read_bytes())


if __name__ == "__main__":
    if sys.argv[1:] == ["graphs"]:
        graphs()
    else:
        text = json.dumps(signatures(Path(sys.argv[2], "QEfficient")), indent=4)
        (HERE / "signatures.json").write_text(text + "\n", encoding="utf-8")
