"""The README runner on small READMEs that must pass, fail and skip, each for the right reason."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.docs import readme
from tests.docs.readme import Runner, parse

ROOT = Path(__file__).resolve().parents[2]


def outcomes(tmp_path, text, **settings):
    """(line, outcome, why) of each block."""
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    runner = Runner(**settings)
    return [(block.line, *runner.outcome(block)) for block in parse(path)]


def bash(*lines):
    return "\n".join(["```bash", *lines, "```", ""])


def text(*lines):
    return "\n".join(["```text", *lines, "```", ""])


def marked(name, content):
    return f"<!-- Tripy: {name} Start -->\n{content}<!-- Tripy: {name} End -->\n"


def expected(regex):
    return marked("EXPECTED_STDOUT", f"<!--\n```\n{regex}\n```\n -->\n")


def needs(*what):
    return f"<!-- Needs: {', '.join(what)} -->\n"


PASS = {
    "a command": bash("true"),
    "a block is one script": bash("# a comment", "x=5", "cd /", 'test "$x$PWD" = 5/'),
    "in a list": "1. Run:\n\n    ```bash\n    cat <<END\n    a\n    END\n    ```\n    ```text\n    a\n    ```\n",
    "expected": bash("echo one; echo two") + expected("one\ntw."),
    "expected is a regex for the beginning": bash("echo 'one (two) three'") + expected(r"(?s).*?\(two\)"),
    "both sides are dedented": bash("printf '  a\\n   b\\n'") + expected("    a\n     b"),
    "text": bash("echo one; echo two") + text("one", "two"),
    "text after a paragraph": bash("echo one") + "\nIt prints\n\n" + text("one"),
    "text after another fence": bash("echo one") + "```json\n1\n```\n" + text("one"),
    "dots within a line": bash("echo 'took 0.53 s (fast)'") + text("took ... s (fast)"),
    "dots for any lines": bash("seq 9") + text("...", "1", "...", "8", "9", "..."),
    "stderr is not stdout": bash("echo one; echo two >&2") + text("one"),
    "text in another section": bash("echo one") + "# Tree\n" + text("two"),
    "ignored text": bash("echo 1") + marked("IGNORE", text("2")),
    "other labels are not run": bash("true") + "```python\nraise\n```\n```mermaid\nflowchart\n```\n",
    "must fail and does": marked("XFAIL", bash("echo no; exit 3") + text("no")),
    "another comment": "<!-- a note: see https://example.org, this is the End -->\n" + bash("true"),
    "a block between HTML": "<details>\n\n" + bash("true") + "\n</details>\n",
    "a marker that is only quoted": "Write `<!-- Tripy: XFAIL Start -->`\n" + bash("true"),
    "this python": bash(f"python -c 'import sys; sys.exit(sys.prefix != \"{sys.prefix}\")'", "pip --version"),
    "the readme's folder": bash("test -f README.md"),
    "standard input is empty": bash('test -z "$(cat)"'),
    "nothing of pytest": bash('test -z "$PYTEST_CURRENT_TEST$PYTHONPATH"'),
    "an empty hub": bash('echo "$HF_HUB_OFFLINE $HF_HUB_CACHE"') + text("1 /dev/null"),
    "the hub for a block that declares it": needs("network") + bash('test -z "$HF_HUB_OFFLINE"'),
}

FAIL = {
    "a command": (bash("echo out; echo err >&2; exit 3"), r"^exit status 3\n[\s\S]*out[\s\S]*err"),
    "not the last command": (bash("false", "true"), "^exit status 1"),
    "in a pipe": (bash("false | cat"), "^exit status 1"),
    "unknown command": (bash("no-such-command-here"), "^exit status 127"),
    "status before wrong output": (bash("echo two; false") + text("one"), "^exit status 1"),
    "expected": (bash("echo two one") + expected("one"), "^stdout is not what line 5 expects"),
    "text": (bash("echo one") + text("two"), r"^stdout is not what line 4 expects\n--- expected\ntwo"),
    "text is all of it": (bash("seq 2") + text("1"), "^stdout is not what"),
    "text is not a regex": (bash("echo 1x5") + text("1.5"), "^stdout is not what"),
    "dots stay in their line": (bash("echo a; echo b c") + text("a...c"), "^stdout is not what"),
    "the second of two": (bash("echo 1") + text("1") + expected("2"), "^stdout is not what line 8"),
    "too slow": (bash("sleep 600"), "^still running after 0.5 s"),
    "must fail and passes": (marked("XFAIL", bash("true")), "^marked XFAIL, and it passes"),
    "must fail, by a missing command": (marked("XFAIL", bash("no-such-command")), "^marked XFAIL, but .* 127"),
    "must fail, by a signal": (marked("XFAIL", bash("kill -9 $$")), "^marked XFAIL, but exit status -9"),
    "must fail, by a syntax error": (marked("XFAIL", bash("if then")), "^marked XFAIL, but .* the shell's own"),
    "must fail, by a missing folder": (marked("XFAIL", bash("cd nowhere")), "^marked XFAIL, but .* shell's own"),
    "must fail with other output": (marked("XFAIL", bash("echo no; false") + text("yes")), "^stdout is not"),
    "must fail and is too slow": (marked("XFAIL", bash("sleep 600")), "^still running after 0.5 s"),
    "unknown marker": (marked("XFIAL", bash("true")), "^unknown marker 'Tripy: XFIAL Start'"),
    "a marker without a colon": ("<!-- Tripy XFAIL Start -->\n" + bash("false"), "^unknown marker"),
    "a marker in lower case": ("<!-- needs: network -->\n" + bash("true"), "^unknown marker 'needs"),
    "a marker without its edge": ("<!-- XFAIL -->\n" + bash("true"), "^unknown marker 'XFAIL'"),
    "unknown need": (needs("a gpu") + bash("true"), "^needs must be of .*nvidia gpu, .*, got 'a gpu'"),
    "a need without a block": (bash("true") + needs("network"), "^no block of commands follows Needs: network"),
    "a need before a section": (needs("network") + "# Next\n" + bash("true"), "^no block of commands follows Needs"),
    "a need of a block above the first": (needs("the block above") + bash("true"), "^there is no block for Needs"),
    "unclosed marker": ("<!-- Tripy: XFAIL Start -->\n" + bash("false"), "^XFAIL Start has no End"),
    "marker closed first": ("<!-- Tripy: XFAIL End -->\n" + bash("false"), "^XFAIL End has no XFAIL Start"),
    "marker opened twice": (marked("XFAIL", marked("XFAIL", bash("false"))), "^XFAIL Start has no XFAIL End before"),
    "marker in a line": ("See <!-- Tripy: XFAIL Start --> this\n" + bash("true"), "put it on a line of its own"),
    "unclosed comment": (bash("true") + "\n<!-- Tripy: XFAIL Start\n", "^a comment needs lines of its own"),
    "expected before its block": (expected("x") + bash("true"), "must follow a block of commands in its section"),
    "expected in another section": (bash("true") + "# Next\n" + expected("x"), "must follow a block of commands"),
    "expected is empty": (bash("true") + expected(""), "^EXPECTED_STDOUT must not be empty"),
    "expected is not a regex": (bash("echo '('") + expected("("), "^EXPECTED_STDOUT must be a regular expression"),
    "an empty block": ("```bash\n\n```\n", "^the block is empty"),
    "an unknown label": ("```zsh\nfalse\n```\n" + bash("true"), "^label must be bash .*, got 'zsh'"),
    "no label": ("```\ntrue\n```\n", "^label must be bash .*, got ''"),
    "indented code": ("Run\n\n    false\n\n" + bash("true"), "^indented code is not run"),
    "a fence inside HTML": ("<details>\n" + bash("false") + "</details>\n\n" + bash("true"), "a fence after HTML"),
    "a pre that is not closed": (bash("true") + "\n<pre>\n\n" + bash("false"), "a fence after HTML"),
    "a fence that is not closed": (bash("true") + "```python\nx\n\n# H\n```bash\nfalse\n", "^the fence is not closed"),
    "a second text": (bash("echo 1") + text("1") + text("2"), "^this text is compared with nothing"),
    "nothing to run": ("# Title\n" + text("just words"), "^there is no block of commands"),
}

SKIP = {
    "ignored": (marked("IGNORE", bash("false")), "marked IGNORE"),
    "minutes": (needs("minutes") + bash("false"), "needs minutes: run with --slow"),
    "an installation": (needs("package index") + bash("false"), "needs package index: run with --install"),
    "one of two": (needs("network", "cloud ai 100") + bash("false"), "needs cloud ai 100"),
    "one of two comments": (needs("cloud ai 100") + needs("network") + bash("false"), "needs cloud ai 100"),
    "must fail, elsewhere": (marked("XFAIL", needs("nvidia gpu") + bash("true")), "needs nvidia gpu"),
}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Has a network and nothing else."""
    for need in readme.NEEDS:
        monkeypatch.setitem(readme.NEEDS, need, lambda need=need: need == "network")
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("markdown", PASS.values(), ids=PASS)
def test_passes(tmp_path, markdown):
    assert [(outcome, why) for _, outcome, why in outcomes(tmp_path, markdown)] == [("passed", "")]


@pytest.mark.parametrize(("markdown", "reason"), FAIL.values(), ids=FAIL)
def test_fails_for_its_reason(tmp_path, markdown, reason):
    limit_s = 0.5 if "sleep 600" in markdown else readme.LIMIT_S
    failed = [why for _, outcome, why in outcomes(tmp_path, markdown, limit_s=limit_s) if outcome == "failed"]
    assert len(failed) == 1 and re.search(reason, failed[0]), failed


@pytest.mark.parametrize(("markdown", "reason"), SKIP.values(), ids=SKIP)
def test_skips_for_its_reason(tmp_path, markdown, reason):
    assert [(outcome, why) for _, outcome, why in outcomes(tmp_path, markdown)] == [("skipped", reason)]


def test_the_block_above_runs_once_and_first(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(bash("echo x >> out") + needs("the block above") + bash("cat out") + text("x"), encoding="utf-8")
    first, second = parse(path)
    runner = Runner()
    assert runner.outcome(second) == runner.outcome(first) == ("passed", "")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "x\n"


def test_a_block_shares_the_outcome_of_the_block_above(tmp_path):
    chained = needs("the block above") + bash("true")
    skipped = outcomes(tmp_path, needs("neuron core") + bash("true") + 2 * chained)
    assert [(outcome, why) for _, outcome, why in skipped] == 3 * [("skipped", "needs neuron core")]
    assert outcomes(tmp_path, bash("false") + chained)[1] == (5, "failed", "the block above, line 1, failed")


# its background process creates `ended` when it is asked to end, so it must have been killed if that is missing
STAYS = bash(
    "(trap 'touch ended; exit' TERM; touch ready; while :; do sleep 0.1; done) & echo $! > pid",
    "until test -f ready; do sleep 0.1; done",
)


def is_gone(tmp_path):
    pid = int((tmp_path / "pid").read_text(encoding="utf-8"))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.5)
    return not (tmp_path / "ended").exists()


def test_what_a_block_leaves_running_is_killed(tmp_path):
    assert outcomes(tmp_path, STAYS) == [(1, "passed", "")]
    assert is_gone(tmp_path)


def test_a_block_that_is_too_slow_is_killed(tmp_path):
    [(_, outcome, why)] = outcomes(tmp_path, STAYS.replace("done\n```", "done; sleep 600\n```"), limit_s=3)
    assert outcome == "failed" and why.startswith("still running after 3 s\n")
    assert is_gone(tmp_path)


def test_a_daemon_does_not_delay_the_end(tmp_path):
    """It has a session of its own, and the block's stdout, as long as it lives."""
    markdown = bash("setsid sleep 600 & echo $! > pid; echo on") + text("on")
    assert [outcome for _, outcome, _ in outcomes(tmp_path, markdown)] == ["passed"]
    os.kill(int((tmp_path / "pid").read_text(encoding="utf-8")), signal.SIGKILL)


def test_minutes_have_a_limit_of_their_own(tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(readme, "_run", lambda block, limit_s, prefix: limits.append(limit_s) or (0, "", ""))
    outcomes(tmp_path, needs("minutes") + bash("true") + bash("true"), slow=True, limit_s=7)
    assert limits == [readme.SLOW_LIMIT_S, 7] and readme.SLOW_LIMIT_S >= 3600


def test_a_readme_installs_into_a_clean_venv_and_runs_there(tmp_path, monkeypatch):
    monkeypatch.setitem(readme.NEEDS, "package index", lambda: True)
    seen = "python -c 'import sys; print(sys.prefix)' >>seen; pip --version"
    clean = needs("package index") + bash(seen, "! python -c 'import pytest'")
    found = outcomes(tmp_path, bash(seen) + clean + bash(seen), install=True)
    assert [outcome for _, outcome, _ in found] == 3 * ["passed"]
    before, there, after = (tmp_path / "seen").read_text(encoding="utf-8").splitlines()
    assert before == sys.prefix != there == after and not Path(there).exists()


def test_every_need_can_be_checked_on_any_machine(monkeypatch):
    monkeypatch.undo()
    assert all(isinstance(has(), bool) for has in readme.NEEDS.values())


def test_each_block_is_a_test_with_its_line_in_its_name(tmp_path):
    markdown = bash("true") + bash("false") + needs("minutes") + bash("touch slow")
    (tmp_path / "README.md").write_text(markdown, encoding="utf-8")

    def run(*arguments):
        command = [sys.executable, "-m", "pytest", "tests/docs/test_readme.py", "-v", "-p", "no:cacheprovider"]
        command += [f"--readme={tmp_path}/README.md", *arguments]
        environment = os.environ | {"COLUMNS": "200"}
        return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", env=environment)

    result = run()
    assert result.returncode == 1
    assert "README.md:1] PASSED" in result.stdout
    assert "README.md:4] FAILED" in result.stdout
    assert "README.md:8] SKIPPED (needs minutes: run with --slow)" in result.stdout
    assert "\n2 of 3 blocks of commands ran; 1 needs minutes: run with --slow\n" in result.stdout
    assert run("--slow", "-k", "README.md:8").returncode == 0 and (tmp_path / "slow").exists()
    assert run("--readme=nothing.md").returncode not in (0, 1)
