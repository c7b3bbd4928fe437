"""train.py's configuration: defaults, then config files, then --key=value, each checked and nothing executed.

A config file holds Python assignments of literals, one per key: `learning_rate = 1e-3`.
"""

import ast
import difflib
from dataclasses import fields, replace
from pathlib import Path

LITERAL_ERRORS = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError)  # what ast.literal_eval raises


def check_type(key, value, types, where=""):
    """value in the type of the key's default: an int is accepted for a float, and nothing else is converted."""
    if key not in types:
        raise ValueError(f"{where}unknown setting {key}; {suggestion(key, types)}")
    wanted = types[key]
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ValueError(f"{where}{key} must be of type {wanted.__name__}, got {value!r}")
    return value


def suggestion(key, names):
    """The initials of a setting are taken for it, as in lr for learning_rate."""
    initials = [name for name in names if key == "".join(word[:1] for word in name.split("_"))]
    similar = initials or difflib.get_close_matches(key, names, n=1)
    return f"did you mean {' or '.join(similar)}?" if similar else "--help lists the settings"


def read_file(path, types):
    """A config file's assignments as a dict."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, *LITERAL_ERRORS) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a config file: {error}") from None
    settings = {}
    for statement in tree.body:
        where = f"{path}:{statement.lineno}: "
        match statement:
            case ast.Expr(ast.Constant(str())):
                continue  # a docstring
            case ast.Assign([ast.Name(key)], node):
                try:
                    value = ast.literal_eval(node)
                except LITERAL_ERRORS:
                    raise ValueError(f"{where}{key} must be a literal, got {ast.unparse(node)}") from None
                settings[key] = check_type(key, value, types, where)
            case _:
                raise ValueError(f"{where}each line must be key = literal, got {ast.unparse(statement)!r}")
    return settings


def read_flag(argument, types):
    """--key=value as a dict of one; a bool may come without a value, and a string needs no quotes."""
    key, equals, text = argument[2:].partition("=")
    if not equals and types.get(key) is bool:
        text = "True"
    elif not equals:
        raise ValueError(f"a flag must be --key=value, got {argument!r}")
    try:
        value = text if types.get(key) is str else ast.literal_eval(text)
    except LITERAL_ERRORS:
        value = text
    return {key: check_type(key, value, types)}


def configure(defaults, arguments, folder):
    """defaults is a dataclass instance; a config file is looked for from here, then from folder."""
    types = {field.name: type(getattr(defaults, field.name)) for field in fields(defaults)}
    from_files, from_flags = {}, {}
    for argument in arguments:
        if argument.startswith("--"):
            from_flags |= read_flag(argument, types)
        else:
            path = Path(argument)
            from_files |= read_file(path if path.exists() else folder / path, types)
    return replace(defaults, **from_files | from_flags)
