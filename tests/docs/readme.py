"""A README's commands as tests. CONTRIBUTING.md tells writers the rules; this file is the rules.

parse() makes a list of blocks, one for each fence of commands and one for each mistake in the markup; Runner.outcome()
runs a block as a reader would: in the README's folder, with this environment's python, from a shell of its own.
"""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

from markdown_it import MarkdownIt

from shared.tokenizer import find_in_cache

COMMANDS = {"bash", "sh", "shell", "console", ""}
OTHERS = {"text", "python", "json", "toml", "ini", "yaml", "mermaid", "diff", "c"}  # not run; any other may be a slip
MARKERS = {"EXPECTED_STDOUT", "XFAIL", "IGNORE"}
ABOVE = "the block above"
MINUTES = "minutes"
LIMIT_S = 300
SLOW_LIMIT_S = 5400


# -- what a machine may lack


def _prints(pattern: str, *command: str) -> bool:
    try:
        result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0 and re.search(pattern, result.stdout) is not None


_LOOK = "import urllib.request; print(urllib.request.urlopen('https://huggingface.co', timeout=5).status)"

NEEDS = {
    "gpt2 weights": lambda: find_in_cache("gpt2") is not None,
    "network": lambda: _prints("200", sys.executable, "-c", _LOOK),
    "nvidia gpu": lambda: _prints(r"GPU \d", "nvidia-smi", "-L"),
    "neuron core": lambda: Path("/dev/neuron0").exists(),
    "cloud ai 100": lambda: _prints(r"Status:\s*Ready", "/opt/qti-aic/tools/qaic-util", "-q"),
    "QEfficient": lambda: importlib.util.find_spec("QEfficient") is not None,
}


# -- reading


@dataclass
class Block:
    readme: Path
    line: int
    script: str = ""
    needs: list[str] = field(default_factory=list)
    xfail: bool = False
    ignored: bool = False
    expected: list[tuple[int, str, Callable]] = field(default_factory=list)  # line, as written, as a matcher
    above: "Block | None" = None
    mistake: str = ""  # in the markup: this is no block but a failure to report


def parse(readme: Path) -> list[Block]:
    """The blocks of commands, and a block for each mistake, in the order of their lines."""
    reader = _Reader(readme)
    text = readme.read_text(encoding="utf-8-sig")
    lines = text.splitlines()
    for token in MarkdownIt().parse(text):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "heading_open":
            reader.section()
        elif token.type == "fence" and not re.fullmatch(
            rf"[\s>]*{token.markup}{token.markup[0]}*\s*", lines[token.map[1] - 1]
        ):
            reader.mistake(line, "the fence is not closed")
        elif token.type == "fence":
            reader.fence(line, (token.info.split() or [""])[0].lower(), token.content)
        elif token.type == "code_block":
            reader.mistake(line, "indented code would not be run: fence it, with a label")
        elif token.type == "html_block":
            reader.html(line, token.content)
        elif token.type == "inline" and any(
            child.type == "html_inline" and "<!--" in child.content for child in token.children
        ):
            reader.mistake(line, "a comment inside a line of text is no marker: give it a line of its own")
    return reader.finish()


class _Reader:
    """Goes through the README from top to bottom, and remembers what the next block and the last one are owed."""

    def __init__(self, readme: Path):
        self.readme = readme
        self.blocks: list[Block] = []
        self.mistakes: list[Block] = []
        self.open: dict[str, tuple[int, int]] = {}  # marker -> the line where it began, the blocks until then
        self.needs: list[str] = []
        self.needs_line = 0
        self.last: Block | None = None  # in this section
        self.text_belongs = False  # whether a `text` fence here is what the last block prints
        self.regex: list[str] = []

    def mistake(self, line: int, message: str) -> None:
        self.mistakes.append(Block(self.readme, line, mistake=message))

    def section(self) -> None:
        self._needs_go_unused()
        self.last, self.text_belongs = None, False

    def finish(self) -> list[Block]:
        self._needs_go_unused()
        for marker, (line, _) in self.open.items():
            self.mistake(line, f"{marker} Start has no {marker} End")
        if not self.blocks:
            self.mistake(1, "there is no block of commands here")
        return sorted([*self.blocks, *self.mistakes], key=lambda block: block.line)

    def fence(self, line: int, label: str, content: str) -> None:
        if "EXPECTED_STDOUT" in self.open:
            self.regex += content.splitlines()
        elif label in COMMANDS:
            self._commands(line, label, content)
        elif label not in OTHERS:
            self.mistake(line, f"unknown label {label!r}: commands are {sorted(COMMANDS)}, others {sorted(OTHERS)}")
        else:
            self._needs_go_unused()
            if label == "text" and self.last and "IGNORE" not in self.open:
                if self.text_belongs:
                    self.last.expected.append((line, content, _text_matcher(content)))
                else:
                    self.mistake(
                        line, "this text would be compared with nothing: it does not follow a block, or IGNORE it"
                    )
                self.text_belongs = False

    def _commands(self, line: int, label: str, content: str) -> None:
        script, output = _split_console(content) if re.search(r"^\$ ", content, re.M) else (content, "")
        if not script.strip():
            self.mistake(line, "the block is empty")
        if label == "console" and script is content:
            self.mistake(line, "a console block marks its commands with '$ '")
        above = self.blocks[-1] if self.blocks else None
        if ABOVE in self.needs and not above:
            self.mistake(line, f"Needs: {ABOVE}, and there is none")
        self.last = Block(self.readme, line, script, self.needs, "XFAIL" in self.open, "IGNORE" in self.open)
        self.last.above = above if ABOVE in self.needs else None
        if output:
            self.last.expected.append((line, output, _text_matcher(output)))
        self.blocks.append(self.last)
        self.needs, self.text_belongs = [], not output

    def html(self, line: int, content: str) -> None:
        end = 0
        for comment in re.finditer(r"<!--(.*?)-->", content, re.S):
            self._comment(line + content.count("\n", 0, comment.start()), comment[1])
            end = comment.end()
        if "<!--" in content[end:]:
            self.mistake(line + content.count("\n", 0, end), "the comment is not closed")
        if re.search(r"```|~~~|<pre", re.sub(r"<!--.*?-->", "", content, flags=re.S)):
            self.mistake(line, "a fence right behind HTML, or <pre>, would not be run: put an empty line before it")

    def _comment(self, line: int, content: str) -> None:
        for number, text in enumerate(content.split("\n"), line):
            if marker := re.fullmatch(r"\s*Tripy:\s*(?:TEST:\s*)?(\w+)\s+(Start|End)\s*", text):
                self._marker(number, *marker.groups())
            elif "EXPECTED_STDOUT" in self.open:
                self.regex.append(text)
            elif needs := re.fullmatch(r"\s*Needs:(.*)", text):
                self._need(number, [need.strip() for need in needs[1].split(",")])
            elif re.match(r"(?i)\s*needs?\b|.*\b(tripy|xfail|expected_stdout)\b", text):
                self.mistake(number, f"unknown marker {text.strip()!r}: there are 'Needs: …' and 'Tripy: … Start'")

    def _marker(self, line: int, marker: str, edge: str) -> None:
        if marker not in MARKERS:
            self.mistake(line, f"unknown marker {marker!r}: there are {sorted(MARKERS)}")
        elif edge == "Start" and marker in self.open:
            self.mistake(line, f"{marker} is open since line {self.open[marker][0]}")
        elif edge == "Start":
            self.open[marker] = line, len(self.blocks)
        elif marker not in self.open:
            self.mistake(line, f"{marker} End has no {marker} Start")
        else:
            start, blocks = self.open.pop(marker)
            if marker == "XFAIL" and blocks == len(self.blocks):
                self.mistake(start, "XFAIL encloses no block of commands")
            if marker == "EXPECTED_STDOUT":
                self._expect(start, "\n".join(self.regex))
                self.regex = []

    def _expect(self, line: int, content: str) -> None:
        content = re.sub(r"^\s*```\w*\s*$", "", content, flags=re.M)
        regex = dedent(content).strip()
        if not self.last:
            self.mistake(line, "EXPECTED_STDOUT follows no block of commands in its section")
        elif not regex:
            self.mistake(line, "EXPECTED_STDOUT is empty")
        else:
            try:
                self.last.expected.append((line, regex, re.compile(regex).match))
            except re.error as error:
                self.mistake(line, f"EXPECTED_STDOUT is no regular expression: {error}")

    def _need(self, line: int, needs: list[str]) -> None:
        self._needs_go_unused()
        self.needs, self.needs_line = needs, line
        for need in needs:
            if need not in NEEDS and need not in (ABOVE, MINUTES):
                self.mistake(line, f"unknown need {need!r}: there are {[*NEEDS, MINUTES, ABOVE]}")

    def _needs_go_unused(self) -> None:
        if self.needs:
            self.mistake(self.needs_line, f"Needs: {', '.join(self.needs)} stands before no block of commands")
        self.needs = []


def _split_console(content: str) -> tuple[str, str]:
    """The commands behind `$ `, with the lines that a backslash carries on, and the output between them."""
    script, output, carried = [], [], False
    for line in content.splitlines():
        command = carried or line.startswith("$ ")
        (script if command else output).append(line.removeprefix("> " if carried else "$ ") if command else line)
        carried = command and line.endswith("\\")
    return "\n".join(script), "\n".join(output)


def _text_matcher(text: str) -> Callable:
    """Matches all of stdout; `...` stands for anything within a line, a line of `...` for any lines or none."""
    pattern = ""
    for line in dedent(text).strip().splitlines():
        if line.strip() == "...":
            pattern += r"(?:.*\n)*?" * (not pattern.endswith("*?"))  # two in a row would try every pair of ends
        else:
            pattern += re.escape(line.rstrip()).replace(r"\.\.\.", ".*?") + r"[^\S\n]*\n"
    return lambda stdout: re.fullmatch(pattern, stdout + "\n")


# -- running


class Runner:
    def __init__(self, slow: bool = False, limit_s: float = LIMIT_S):
        self.slow = slow
        self.limit_s = limit_s
        self.left: dict[tuple[Path, int], list[str]] = {}  # files that a block made, changed or removed
        self._outcomes: dict[tuple[Path, int], tuple[str, str]] = {}

    def outcome(self, block: Block) -> tuple[str, str]:
        """("passed" | "failed" | "skipped", why); a block runs once, also where another one needs it."""
        if block.mistake:
            return "failed", block.mistake
        key = block.readme, block.line
        if key not in self._outcomes:
            self._outcomes[key] = self._outcome(block)
        return self._outcomes[key]

    def _outcome(self, block: Block) -> tuple[str, str]:
        if block.ignored:
            return "skipped", "marked IGNORE"
        if block.above:
            before, why = self.outcome(block.above)
            if before != "passed":
                return before, why if before == "skipped" else f"the block above, line {block.above.line}, failed"
        for need in block.needs:
            if need == MINUTES and not self.slow:
                return "skipped", f"needs {MINUTES}: run with --slow"
            if need in NEEDS and not NEEDS[need]():
                return "skipped", f"needs {need}"
        return self._run(block)

    def _run(self, block: Block) -> tuple[str, str]:
        limit_s = SLOW_LIMIT_S if MINUTES in block.needs else self.limit_s
        folder = block.readme.resolve().parent
        before = _files(folder)
        # files and not pipes, which a daemon would hold open
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            shell = subprocess.Popen(
                ["bash", "-eo", "pipefail", "-c", block.script],
                cwd=folder,
                env=_environment(block.needs),
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
                os.killpg(shell.pid, signal.SIGKILL)  # also what the block left running
            shell.wait()
            stdout, stderr = _read(out), _read(err)
        after = _files(folder)
        changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        self.left[block.readme, block.line] = sorted(changed)
        if status is None:
            complaint = f"still running after {limit_s:g} s"
        else:
            complaint = _complaint(block, status, stdout, stderr)
        if not complaint:
            return "passed", ""
        return "failed", f"{complaint}\n--- commands\n{block.script}\n--- stdout\n{stdout}\n--- stderr\n{stderr}"


def _read(file) -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")


def _complaint(block: Block, status: int, stdout: str, stderr: str) -> str:
    if not block.xfail and status != 0:
        return f"exit status {status}"
    if block.xfail and status == 0:
        return "marked XFAIL, and it passes"
    if block.xfail and (not 0 < status < 126 or re.search("^bash: ", stderr, re.M)):
        return f"marked XFAIL, but exit status {status} is a signal's or the shell's own, not the failure of a command"
    for line, text, matches in block.expected:
        if not matches(dedent(stdout).strip()):
            return f"stdout is not what line {line} expects\n--- expected\n{text}"
    return ""


def _environment(needs: list[str]) -> dict[str, str]:
    """The reader's: this python first on the path, nothing of pytest's or tox's, and no model but those declared."""
    ours = {name for name in os.environ if name.startswith(("PYTEST_", "TOX_")) or name == "PYTHONPATH"}
    environment = {name: value for name, value in os.environ.items() if name not in ours} | {
        "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", os.defpath),
        "VIRTUAL_ENV": sys.prefix,
    }
    if not {"network", "gpt2 weights"} & {*needs}:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": os.devnull}
    return environment


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file; not of git's, the environments' and the caches' own."""
    found = {}
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        for name in names:
            path = Path(top, name)
            try:
                stat = path.lstat()
            except FileNotFoundError:
                continue
            found[path.relative_to(folder).as_posix()] = stat.st_size, stat.st_mtime_ns
    return found
