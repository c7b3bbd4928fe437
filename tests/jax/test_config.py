"""Settings: from files and flags, each checked; nothing in them is executed."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_nanogpt.config import configure
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


def test_a_flag_overrides_a_file_in_any_order_and_the_last_of_each_counts(tmp_path):
    for name, count in ("first.py", 1), ("second.py", 2):
        (tmp_path / name).write_text(f"count = {count}\nrate = {count}.0", encoding="utf-8")
    found = configure(Toy(), ["--count=7", "first.py", "--count=8", "second.py"], tmp_path)
    assert found == Toy(count=8, rate=2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("counts = 3", "toy.py:1: unknown setting counts; did you mean count?"),
        ("zzzz = 3", "toy.py:1: unknown setting zzzz; --help lists the settings"),
        ("\ncount = 1.5", "toy.py:2: count must be of type int, got 1.5"),
        ("count = True", "count must be of type int, got True"),
        ("count = 2 * 3", "count must be a literal, got 2 * 3"),
        ("import os", "toy.py:1: each line must be key = literal, got 'import os'"),
        ("count: int = 3", "each line must be key = literal"),
        ("count = ", "cannot be read as a config file"),
        ("count = " + "-" * 5000 + "1", "toy.py"),  # beyond the parser's or the evaluator's recursion
    ],
)
def test_a_mistake_in_a_file_is_named(text, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_file(text, tmp_path)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--cuont=3", "unknown setting cuont; did you mean count?"),
        ("--count", "a flag must be --key=value, got '--count'"),
        ("--count=x", "count must be of type int, got 'x'"),
        ("--count=" + "(" * 5000, "count must be of type int"),
        ("nowhere.py", "nowhere.py' cannot be read as a config file"),
    ],
)
def test_a_mistake_in_a_flag_is_named(flag, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_file("", tmp_path, flag)


@given(st.from_type(Toy))
def test_a_flag_gives_back_every_value(toy):
    flags = [f"--{key}={value}" for key, value in vars(toy).items()]
    if toy.rate == toy.rate and abs(toy.rate) != float("inf"):  # NaN and infinity have no literal
        assert configure(Toy(), flags, Path()) == toy


@pytest.mark.parametrize("path", sorted((PROJECT / "config").glob("*.py")), ids=lambda path: path.stem)
def test_the_config_files_hold_known_settings_within_limits(path):
    configure(Config(), [str(path)], PROJECT).check()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--lr=1", "unknown setting lr; did you mean learning_rate?"),
        ("--optimizer=sgd", "optimizer must be one of adamw, muon, got 'sgd'"),
        ("--batch_size=0", "batch_size must be 1 or more, got 0"),
        ("--n_head=0", "n_head must be 1 or more, got 0"),
        ("--process_id=-1", "process_id must be 0 or more, got -1"),
        ("--dropout=-0.1", "dropout must be a finite number, 0 or more, got -0.1"),
        ("--dropout=1.0", "dropout must be below 1, got 1.0"),
        ("--min_lr=1e999", "min_lr must be a finite number, 0 or more, got inf"),
        ("--learning_rate=0", "learning_rate must be above 0, got 0.0"),
        ("--mesh=heads:2", "got 'heads:2' in 'heads:2'"),
        ("--num_processes=2", "coordinator must be host:port or auto if num_processes is above 1, got ''"),
        ("--coordinator=x", "coordinator must be host:port or auto if num_processes is above 1, got 'x'"),
        ("--process_id=1", "process_id must be below num_processes (1), got 1"),
        ("--n_head=5", "n_embd must be a multiple of n_head (5), got 768"),
        ("--out_dir=", "out_dir must be a folder, got ''"),
        (f"--profile={PROJECT / 'train.py'}", "profile must be a folder, got "),
        ("--seed=18446744073709551616", "seed must be below 2**63, got 18446744073709551616"),
    ],
)
def test_a_setting_outside_its_limits_is_refused(flag, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        configure(Config(), [flag], PROJECT).check()
