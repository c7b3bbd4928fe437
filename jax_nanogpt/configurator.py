"""train.py's configuration: defaults, then config files, then --key=value, each checked and nothing executed.

A config file holds Python assignments of literals, one a key: `learning_rate = 1e-3`.
"""

import ast
import difflib
from dataclasses import fields, replace
from pathlib import Path


def converted(where, key, value, types):
    """value in the type of the key's default: an int will do for a float, nothing else will do for another."""
    if key not in types:
        near = difflib.get_close_matches(key, types) or sorted(types)
        raise ValueError(f"{where}: {key} is no setting; near are: {', '.join(near)}")
    wanted = types[key]
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ValueError(f"{where}: {key} is {value!r}, a value of type {wanted.__name__} is expected")
    return value


def read_file(path, types):
    """A config file's assignments as a dict."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path} is not a readable config file: {error}") from None
    found = {}
    for statement in tree.body:
        where = f"{path}:{statement.lineno}"
        match statement:
            case ast.Expr(ast.Constant(str())):
                continue  # a docstring
            case ast.Assign([ast.Name(key)], node):
                try:
                    value = ast.literal_eval(node)
                except ValueError:
                    raise ValueError(f"{where}: {key} is {ast.unparse(node)}, a literal is expected") from None
                found[key] = converted(where, key, value, types)
            case _:
                raise ValueError(f"{where}: `{ast.unparse(statement)}` is not of the form: key = literal")
    return found


def read_flag(argument, types):
    """--key=value as a dict of one; a bool may stand alone, and a string needs no quotes."""
    key, equals, text = argument[2:].partition("=")
    if not equals and types.get(key) is bool:
        text = "True"
    elif not equals:
        raise ValueError(f"{argument}: the form is --key=value")
    try:
        value = text if types.get(key) is str else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    return {key: converted(argument, key, value, types)}


def configure(defaults, arguments, folder):
    """defaults is a dataclass instance, folder where a config file is looked for if not from here."""
    types = {field.name: type(getattr(defaults, field.name)) for field in fields(defaults)}
    from_files, from_flags = {}, {}
    for argument in arguments:
        if argument.startswith("--"):
            from_flags |= read_flag(argument, types)
        else:
            path = Path(argument)
            from_files |= read_file(path if path.exists() else folder / path, types)
    return replace(defaults, **from_files | from_flags)
