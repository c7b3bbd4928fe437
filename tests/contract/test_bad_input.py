"""Bad input: every script works, or ends with status 2 and one line that names what is wrong. make fuzz tries more.

A failure is shrunk and kept in .hypothesis, so that the next run begins with it.
"""

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, note, settings

from tests.contract.bad_input import bad_words, cuts, damage, damages, write_files
from tests.contract.places import copy_of, is_temporary
from tests.contract.served import Served
from tests.conventions.rules import ROOT, example_of
from tests.tools.examples import EXAMPLES, command, read_dump

EXAMPLE_OF = {project: example_of(ROOT, project) for project in EXAMPLES}
WORDS = {  # of a good run
    "jax_nanogpt/train.py": "--init_from=scratch --dataset=dataset --out_dir=out --n_layer=1 --n_head=2 --n_embd=8 "
    "--block_size=8 --batch_size=2 --gradient_accumulation_steps=1 --max_iters=2 --iters_per_call=2 --eval_interval=2 "
    "--eval_iters=1 --dtype=float32",
    "jax_nanogpt/weight_loader.py": "--out_dir=out --to=exported",
    "jax_nanogpt/eval.py": "--model=model --input=text.txt",
    "neuron_nanogpt/sample.py": "--model=model --prompt=To --max-new-tokens=2 --temperature=0",
}
WORDS |= {f"{project}/bench.py": "--model=nothing" for project in EXAMPLES}  # a good run takes minutes
SCRIPTS = [*EXAMPLE_OF.items(), *(tuple(script.split("/")) for script in WORDS)]


FOUND = [  # by earlier runs, in one project or another
    ["--prompt=--"],  # of which argparse makes an empty list before Python 3.13
    [f"--model={10**6 * 'x'}", "--device=\n\n"],
    ["--dump=device"],  # a file replaced it
    *[[f"--{name}={2**63}"] for name in ("max-new-tokens", "top-k", "seed")],
]


class Sandbox:
    """A copy of the project, and one process that runs its scripts, each time in a fresh folder."""

    def __init__(self, project, python, scratch):
        self.project, self.folder, self.fresh = project, scratch / "case", scratch / "fresh"
        self.example = EXAMPLE_OF[project]
        root = copy_of(project, scratch / "root")
        (root / project / "executables").symlink_to(self.folder / "executables")
        kept = {"QEFF_HOME": self.folder / "qeff", "TMPDIR": self.folder / "tmp", "HF_HOME": scratch / "hub"}
        kept |= {"JAX_COMPILATION_CACHE_DIR": scratch / "jax", "HF_HUB_OFFLINE": "1"}
        self.served = Served(python, root, project, scratch, **{name: str(path) for name, path in kept.items()})
        write_files(self.fresh)
        given_files = self.list_files(self.fresh)
        if project == "jax_nanogpt":
            self.keep("train.py")
        self.keep(self.example)
        self.tokens = read_dump(self.fresh / "dump.npz")["tokens"].tolist()
        (self.fresh / "dump.npz").unlink()
        self.made = sorted(self.list_files(self.fresh) - given_files)

    def good_words(self, script):
        if script == self.example:
            settings = {"model": "model", "prompt": "To be", "new_tokens": 2, "dump": "dump.npz"}
            return [word for word in command(ROOT, self.project, **settings)[1:] if "eos" not in word]
        return WORDS[f"{self.project}/{script}"].split()

    def keep(self, script):
        """What a good run compiles and writes is there from now on."""
        answer = self.run(script, self.good_words(script))
        assert answer.status == 0, answer.stderr
        shutil.rmtree(self.fresh)
        shutil.copytree(self.folder, self.fresh, symlinks=True)

    def flags(self, script):
        """--flag -> what its help says that it takes: nothing, a NAME or {one,of,these}."""
        shown = self.run(script, ["--help"])
        assert (shown.status, shown.stderr) == (0, "")
        lines = re.findall(r"^  (?:-h, )?(--\S.*?)(?:  .*)?$", shown.stdout, re.M)
        flags = (re.fullmatch(r"(--\w[\w-]*)[ =]?(.*)", line.split(", ")[0]).groups() for line in lines)
        return {flag: kind for flag, kind in flags if flag != "--help"}

    def run(self, script, words, spoil=()):
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.fresh, self.folder, symlinks=True)
        if spoil:
            damage(self.folder, *spoil)
        return self.served.run(script, words, self.folder)

    def check(self, script, words=(), spoil=()):
        """Runs the script, and asserts that it ends well. Returns the tokens in its dump, or None."""
        answer = self.run(script, [*self.good_words(script), *words], spoil)
        note(f"{self.project}/{script} {words!s:.300} {spoil}: status {answer.status}\n{answer.stderr[-2000:]}")
        assert answer.status in (0, 2) or answer.status == 1 and "NOT as expected" in answer.stdout
        assert "Traceback" not in answer.stderr
        if answer.status == 2:
            assert answer.stderr.count("\n") == 1 or any("\n" in str(part) for part in (*words, *spoil))
            named = is_named(answer.stderr, words, spoil)  # a failure shows no word of a megabyte
            assert named
            assert not (self.folder / "dump.npz").exists()
        assert not (self.folder / "executed").exists() and (self.folder / "device").is_symlink()
        assert not self.left_behind()
        return answer.status

    def left_behind(self):
        """Temporary files."""
        new = self.list_files(self.folder) - self.list_files(self.fresh)
        return [name for name in new if name.startswith("tmp/") or is_temporary(Path(name).name)]

    def list_files(self, folder):
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def is_named(line, words, spoil):
    """The flag or its value; the damaged file or its folder."""
    pairs = [word.partition("=") for word in words]
    names = {flag.lstrip("-") for flag, _, _ in pairs} | {value for _, _, value in pairs}
    names |= {part for name in spoil[1:2] for part in (Path(name).name, Path(name).parent.name)}
    names |= {"unrecognized arguments", "nothing"}  # an empty word; bench.py's model
    return any(name.replace("-", "_") in line.replace("-", "_") for name in names - {""})


@pytest.fixture(scope="module")
def sandbox(pythons, tmp_path_factory):
    made = {}

    def get(project):
        if project not in made:
            made[project] = Sandbox(project, pythons(project), tmp_path_factory.mktemp(project))
        return made[project]

    yield get
    for one in made.values():
        one.served.close()


def try_all(check, strategy, count, found=()):
    """check(case) for what earlier runs found, and for as many drawn cases; twenty times as many in make fuzz."""
    factor = 20 if settings.get_current_profile_name() == "fuzz" else 1
    check = settings(max_examples=factor * count, suppress_health_check=[*HealthCheck])(given(strategy)(check))
    for case in found:
        check = example(case)(check)
    check()


@pytest.mark.parametrize(("project", "script"), SCRIPTS)
def test_words(project, script, sandbox, report):
    box, ends = sandbox(project), Counter()

    def check(words):
        ends[box.check(script, words)] += 1

    strategy = bad_words(box.flags(script))
    try_all(check, strategy, *((16, FOUND) if script == box.example else (4,)))
    report("counts", f"{project}/{script}: {ends.total()} command lines, {ends[2]} of them refused")


@pytest.mark.parametrize("project", EXAMPLES)
def test_files(project, sandbox, report):
    box, ends = sandbox(project), Counter()

    def check(spoil):
        ends[box.check(box.example, spoil=spoil)] += 1

    found = [("deep" if name.endswith(".json") else "cut", name, 50) for name in box.made]
    try_all(check, damages(box.made), 16, found)
    report("counts", f"{project}: {ends.total()} damaged files, {ends[2]} of them refused")


@pytest.mark.parametrize("project", EXAMPLES)
def test_a_cut_file_is_refused_or_gives_the_same_text(project, sandbox, report):
    box, ends = sandbox(project), Counter()

    def check(spoil):
        ends[status := box.check(box.example, spoil=spoil)] += 1
        assert status or read_dump(box.folder / "dump.npz")["tokens"].tolist() == box.tokens

    try_all(check, cuts, 16)
    report("counts", f"{project}: {ends.total()} cut files, {ends[2]} of them refused")


@pytest.mark.parametrize(("project", "script"), SCRIPTS)
def test_an_unknown_flag_names_the_nearest(project, script, sandbox):
    box = sandbox(project)
    for flag in box.flags(script):
        answer = box.run(script, [*box.good_words(script), f"--x{flag[2:]}=1"])
        assert answer.status == 2 and answer.stderr.count("\n") == 1
        assert re.search(rf"did you mean (--)?{re.escape(flag[2:])}\?", answer.stderr)
