"""A README's commands as tests; CONTRIBUTING.md describes the markup.

parse() lists the blocks of commands, and the first mistake in the markup as one more block that fails. Runner.outcome()
runs a block as a reader would: in the README's folder, with this environment's python, in a shell of its own.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

from markdown_it import MarkdownIt

from shared.tokenizer import find_in_cache

OTHERS = ("text", "python", "json", "mermaid")  # labels of fences that are not run
ABOVE, MINUTES, INDEX = "the block above", "minutes", "package index"
ASKED = {MINUTES: "--slow", INDEX: "--install"}  # run with this flag alone
LIMIT_S = 300
SLOW_LIMIT_S = 5400


# -- what a machine may lack


def _prints(pattern: str, *command: str) -> bool:
    try:
        result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0 and re.search(pattern, result.stdout) is not None


_OPEN = "import urllib.request; print(urllib.request.urlopen('https://huggingface.co', timeout=5).status)"
_INDEX = ("-m", "pip", "--retries=0", "--timeout=5", "index", "versions", "pip")

NEEDS = {
    "gpt2 weights": lambda: find_in_cache("gpt2") is not None,
    "network": lambda: _prints("200", sys.executable, "-c", _OPEN),
    INDEX: lambda: _prints(r"pip \(", sys.executable, *_INDEX),
    "nvidia gpu": lambda: _prints(r"GPU \d", "nvidia-smi", "-L"),
    "fp8 gpu": lambda: _prints(r"^(8\.9|9|\d\d)", "nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"),
    "neuron core": lambda: Path("/dev/neuron0").exists(),
    "cloud ai 100": lambda: _prints(r"Status:\s*Ready", "/opt/qti-aic/tools/qaic-util", "-q"),
}


# -- reading


@dataclass(eq=False)
class Block:
    readme: Path
    line: int
    script: str = ""
    needs: list[str] = field(default_factory=list)
    above: "Block | None" = None  # the block to run first
    xfail: bool = False
    ignored: bool = False
    expected: list[tuple[int, str, re.Pattern]] = field(default_factory=list)  # line, text, pattern
    mistake: str = ""


class Mistake(Exception):
    pass


def parse(readme: Path) -> list[Block]:
    reader = _Reader(readme)
    text = readme.read_text(encoding="utf-8")
    lines = text.split("\n")
    try:
        for token in MarkdownIt().parse(text):
            if token.map:
                reader.line = token.map[0] + 1
                reader.read(token, lines[token.map[1] - 1])
        reader.end()
    except Mistake as mistake:
        reader.blocks.append(Block(readme, reader.line, mistake=str(mistake)))
    return reader.blocks


class _Reader:
    """Goes through a README from top to bottom."""

    def __init__(self, readme: Path):
        self.readme = readme
        self.line = 1
        self.blocks: list[Block] = []
        self.open: set[str] = set()  # markers that have started
        self.needs: list[str] = []  # of the next block
        self.last: Block | None = None  # in this section
        self.has_output = False  # whether a `text` fence gave the output of self.last

    def read(self, token, last_line: str) -> None:
        if token.type == "heading_open":
            self.end_section()
        elif token.type == "fence":
            if not re.fullmatch(rf"[\s>]*{token.markup}+\s*", last_line):
                raise Mistake("the fence is not closed")
            self.fence(token.info.strip(), token.content)
        elif token.type == "code_block":
            raise Mistake("indented code is not run: fence it, with a label")
        elif token.type == "html_block":
            self.html(token.content)
        elif token.type == "inline" and any("<!--" in x.content for x in token.children if x.type == "html_inline"):
            raise Mistake("a comment inside a line is not a marker: put it on a line of its own")

    def end_section(self) -> None:
        if self.needs:
            raise Mistake(f"no block of commands follows Needs: {', '.join(self.needs)}")
        self.last, self.has_output = None, False

    def end(self) -> None:
        self.end_section()
        if self.open:
            raise Mistake(f"{self.open.pop()} Start has no End")
        if not self.blocks:
            raise Mistake("there is no block of commands")

    def fence(self, label: str, content: str) -> None:
        if label == "bash":
            self.commands(content)
        elif label not in OTHERS:
            raise Mistake(f"label must be bash (which is run) or {', '.join(OTHERS)}, got {label!r}")
        elif label == "text" and self.last and "IGNORE" not in self.open:
            if self.has_output:
                raise Mistake("this text is compared with nothing: the last block has its output, so IGNORE this one")
            self.has_output = True
            self.last.expected.append((self.line, content, _text_pattern(content)))

    def commands(self, script: str) -> None:
        if not script.strip():
            raise Mistake("the block is empty")
        if ABOVE in self.needs and not self.blocks:
            raise Mistake(f"there is no block for Needs: {ABOVE}")
        self.last = Block(self.readme, self.line, script, self.needs)
        self.last.above = self.blocks[-1] if ABOVE in self.needs else None
        self.last.xfail, self.last.ignored = "XFAIL" in self.open, "IGNORE" in self.open
        self.blocks.append(self.last)
        self.needs, self.has_output = [], False

    def html(self, content: str) -> None:
        content = content.strip()
        if content.startswith("<!--") and content.endswith("-->"):
            self.comment(content[4:-3])
        elif re.search(r"<!--|```|~~~|<pre", content):
            raise Mistake("a comment needs lines of its own, and a fence after HTML an empty line before it")

    def comment(self, content: str) -> None:
        if marker := re.fullmatch(r"\s*Tripy: (EXPECTED_STDOUT|XFAIL|IGNORE) (Start|End)\s*", content):
            self.marker(*marker.groups())
        elif "EXPECTED_STDOUT" in self.open:
            self.expect(dedent(re.sub(r"^\s*```\s*$", "", content, flags=re.M)).strip())
        elif needs := re.fullmatch(r"\s*Needs: (.*?)\s*", content):
            self.need(re.split(r",\s*", needs[1]))
        elif re.search(r"(?i)\b(needs?|tripy|xfail|ignore|expected_stdout)\b", content):
            raise Mistake(f"unknown marker {content.strip()!r}")

    def marker(self, name: str, edge: str) -> None:
        if (edge == "Start") == (name in self.open):
            raise Mistake(f"{name} {edge} has no {name} {'End' if edge == 'Start' else 'Start'} before it")
        self.open ^= {name}

    def expect(self, regex: str) -> None:
        if not self.last or not regex:
            raise Mistake("EXPECTED_STDOUT must not be empty, and must follow a block of commands in its section")
        try:
            self.last.expected.append((self.line, regex, re.compile(regex)))
        except re.error as error:
            raise Mistake(f"EXPECTED_STDOUT must be a regular expression: {error}") from None

    def need(self, needs: list[str]) -> None:
        self.needs = [*self.needs, *needs]
        for need in needs:
            if need not in (*NEEDS, MINUTES, ABOVE):
                raise Mistake(f"needs must be of {', '.join((*NEEDS, MINUTES, ABOVE))}, got {need!r}")


def _text_pattern(text: str) -> re.Pattern:
    """Of the whole output. `...` matches anything within a line, and a line of `...` any number of lines."""
    lines = [re.escape(line).replace(re.escape("..."), ".*?") + "\n" for line in _normalized(text).splitlines()]
    return re.compile("".join(r"(?:.*\n)*?" if line == ".*?\n" else line for line in lines) + r"\Z")


def _normalized(text: str) -> str:
    return "".join(line.rstrip() + "\n" for line in dedent(text).strip().splitlines())


# -- running


class Runner:
    def __init__(self, slow: bool = False, install: bool = False, limit_s: float = LIMIT_S):
        self.asked = {MINUTES: slow, INDEX: install}
        self.limit_s = limit_s
        self._venvs: dict[Path, tempfile.TemporaryDirectory] = {}  # what a README has installed into, from there on
        self._outcomes: dict[Block, tuple[str, str]] = {}

    def outcome(self, block: Block) -> tuple[str, str]:
        """("passed" | "failed" | "skipped", why); a block runs once, even if another one needs it."""
        if block not in self._outcomes:
            self._outcomes[block] = self._outcome(block)
        return self._outcomes[block]

    def _outcome(self, block: Block) -> tuple[str, str]:
        if block.mistake:
            return "failed", block.mistake
        if block.ignored:
            return "skipped", "marked IGNORE"
        if block.above:
            above, why = self.outcome(block.above)
            if above != "passed":
                return above, why if above == "skipped" else f"the block above, line {block.above.line}, failed"
        for need in block.needs:
            if not self.asked.get(need, True):
                return "skipped", f"needs {need}: run with {ASKED[need]}"
            if need in NEEDS and not NEEDS[need]():
                return "skipped", f"needs {need}"
        if INDEX in block.needs:
            self._venvs = {block.readme: _clean_venv()}  # one at a time: they hold gigabytes
        limit_s = SLOW_LIMIT_S if {*self.asked} & {*block.needs} else self.limit_s
        venv = self._venvs.get(block.readme)
        status, stdout, stderr = _run(block, limit_s, venv.name if venv else sys.prefix)
        message = f"still running after {limit_s:g} s" if status is None else _failure(block, status, stdout, stderr)
        if not message:
            return "passed", ""
        return "failed", f"{message}\n--- commands\n{block.script}\n--- stdout\n{stdout}\n--- stderr\n{stderr}"


def _clean_venv() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory()
    subprocess.run([sys.executable, "-m", "venv", folder.name], check=True)
    return folder


def _run(block: Block, limit_s: float, prefix: str) -> tuple[int | None, str, str]:
    """Exit status (None: it took too long), stdout and stderr."""
    # files rather than pipes, which a daemon would hold open
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        shell = subprocess.Popen(
            ["bash", "-eo", "pipefail", "-c", block.script],
            cwd=block.readme.resolve().parent,
            env=_environment(block.needs, prefix),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            status = shell.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            status = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)  # and what the block left running
        shell.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", errors="replace"))
        return status, *texts


def _failure(block: Block, status: int, stdout: str, stderr: str) -> str:
    if not block.xfail and status != 0:
        return f"exit status {status}"
    if block.xfail and status == 0:
        return "marked XFAIL, and it passes"
    if block.xfail and (not 0 < status < 126 or re.search("^bash: ", stderr, re.M)):
        return f"marked XFAIL, but exit status {status} is a signal's or the shell's own, not the failure of a command"
    for line, text, pattern in block.expected:
        if not pattern.match(_normalized(stdout)):
            return f"stdout is not what line {line} expects\n--- expected\n{text}"
    return ""


def _environment(needs: list[str], prefix: str) -> dict[str, str]:
    """A reader's: prefix/bin first on the path, nothing of pytest's or tox's, and no model but those declared."""
    ours = {name for name in os.environ if name.startswith(("PYTEST_", "TOX_")) or name == "PYTHONPATH"}
    environment = {name: value for name, value in os.environ.items() if name not in ours} | {
        "PATH": str(Path(prefix, "bin")) + os.pathsep + os.environ.get("PATH", os.defpath),
        "VIRTUAL_ENV": prefix,
    }
    if not {"network", "gpt2 weights"} & {*needs}:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": os.devnull}
    return environment
