"""Settings: from files and flags, each checked; nothing in them is executed."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_nanogpt.configurator import configure
from jax_nanogpt.train import Config

PROJECT = Path(__file__).resolve().parents[2] / "jax_nanogpt"


@dataclass(frozen=True)
class Toy:
    name: str = "a"
    count: int = 1
    rate: float = 0.5
    quick: bool = False


def from_file(text, tmp_path, *flags):
    (tmp_path / "toy.py").write_text(text, encoding="utf-8")
    return configure(Toy(), ["toy.py", *flags], tmp_path)


def test_settings_come_from_a_file_and_from_flags(tmp_path):
    text = '"""About."""\n# a comment\nname = "b"  # another\ncount = 7\nrate = 2\nquick = True\n'
    assert from_file(text, tmp_path) == Toy("b", 7, 2.0, True)
    assert from_file(text, tmp_path, "--count=9", "--name=c d", "--quick=False") == Toy("c d", 9, 2.0, False)
    assert from_file("", tmp_path, "--rate=1e-3", "--quick") == Toy(rate=1e-3, quick=True)
    assert from_file("rate = -1.5", tmp_path).rate == -1.5
    assert type(from_file("rate = 2", tmp_path).rate) is float


def test_a_flag_comes_before_a_file_wherever_it_stands_and_the_last_of_each_counts(tmp_path):
    for name, count in ("first.py", 1), ("second.py", 2):
        (tmp_path / name).write_text(f"count = {count}\nrate = {count}.0", encoding="utf-8")
    found = configure(Toy(), ["--count=7", "first.py", "--count=8", "second.py"], tmp_path)
    assert found == Toy(count=8, rate=2.0)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("counts = 3", "toy.py:1: counts is no setting; near are: count"),
        ("zzzz = 3", "toy.py:1: zzzz is no setting; near are: count, name, quick, rate"),
        ("\ncount = 1.5", "toy.py:2: count is 1.5, a value of type int is expected"),
        ("count = True", "count is True, a value of type int is expected"),
        ("quick = 1", "quick is 1, a value of type bool is expected"),
        ("count = 2 * 3", "count is 2 * 3, a literal is expected"),
        ("count = open('x')", "count is open('x'), a literal is expected"),
        ("import os", "toy.py:1: `import os` is not of the form: key = literal"),
        ("count: int = 3", "is not of the form: key = literal"),
        ("if True:\n  count = 3", "is not of the form: key = literal"),
        ("count = ", "is not a readable config file"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(text, complaint, tmp_path):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        from_file(text, tmp_path)


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--cuont=3", "--cuont=3: cuont is no setting; near are: count"),
        ("--count", "--count: the form is --key=value"),
        ("--count=x", "--count=x: count is 'x', a value of type int is expected"),
        ("--rate=fast", "rate is 'fast', a value of type float is expected"),
        ("--count=__import__('os')", "a value of type int is expected"),
        ("nowhere.py", "nowhere.py is not a readable config file"),
    ],
)
def test_a_mistake_in_a_flag_is_one_line(flag, complaint, tmp_path):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        from_file("", tmp_path, flag)


@given(st.from_type(Toy))
def test_every_value_survives_the_way_through_a_flag(toy):
    flags = [f"--{key}={value}" for key, value in vars(toy).items()]
    if toy.rate == toy.rate and abs(toy.rate) != float("inf"):  # these have no literal
        assert configure(Toy(), flags, Path()) == toy


@pytest.mark.parametrize("path", sorted((PROJECT / "config").glob("*.py")), ids=lambda path: path.stem)
def test_the_config_files_hold_known_settings_within_limits(path):
    configure(Config(), [str(path)], PROJECT).check()


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--optimizer=sgd", "optimizer is 'sgd', one of adamw, muon is expected"),
        ("--schedule=step", "schedule is 'step', one of cosine, linear, constant is expected"),
        ("--dtype=float16", "dtype is 'float16', one of float32, bfloat16 is expected"),
        ("--batch_size=0", "batch_size is 0, 1 or more is expected"),
        ("--dropout=-0.1", "dropout is -0.1, 0 or more is expected"),
        ("--dropout=1.0", "dropout is 1.0, below 1 is expected"),
        ("--min_lr=1e999", "min_lr is inf, a finite number is expected"),
        ("--learning_rate=0", "learning_rate is 0.0, above 0 is expected"),
        ("--mesh=heads:2", "mesh is 'heads:2': 'heads:2' is not one of its axes"),
        ("--num_processes=2", "num_processes is 2, and a coordinator, host:port, is expected with it"),
        ("--coordinator=somewhere", "coordinator is 'somewhere', host:port or auto is expected"),
        ("--process_id=1", "process_id is 1, below num_processes (1) is expected"),
        ("--n_head=5", "n_embd is 768, a multiple of n_head (5) is expected"),
    ],
)
def test_a_setting_outside_its_limits_is_refused(flag, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        configure(Config(), [flag], PROJECT).check()
