"""The README runner on small READMEs that must pass, must fail and must skip, each for the right reason."""

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
    """The README's outcomes from top to bottom, as (line, outcome, why)."""
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    runner = Runner(**settings)
    return [(block.line, *runner.outcome(block)) for block in parse(path)]


def bash(*lines):
    return "\n".join(["```bash", *lines, "```", ""])


def text(*lines):
    return "\n".join(["```text", *lines, "```", ""])


def expected_stdout(regex, name="Tripy"):
    return (
        f"<!-- {name}: EXPECTED_STDOUT Start -->\n<!--\n```\n{regex}\n```\n -->\n<!-- {name}: EXPECTED_STDOUT End -->\n"
    )


XFAIL = ("<!-- Tripy: XFAIL Start -->\n", "<!-- Tripy: XFAIL End -->\n")

PASS = {
    "a command": bash("true"),
    "sh": "```sh\ntrue\n```\n",
    "shell": "```shell\ntrue\n```\n",
    "unlabelled": "```\ntrue\n```\n",
    "a label with attributes": '```bash title="x"\ntrue\n```\n',
    "tildes": "~~~bash\ntrue\n~~~\n",
    "several lines are one script": bash("x=5", "cd /", 'test "$x$PWD" = 5/'),
    "a comment is no command": bash("# first", "true"),
    "in a list": "1. Run:\n\n    ```bash\n    cat <<END\n    a\n    END\n    ```\n    ```text\n    a\n    ```\n",
    "expected": bash("echo one; echo two") + expected_stdout("one\ntw."),
    "expected, newer form": bash("echo one") + expected_stdout("one", "Tripy: TEST"),
    "expected, one comment": bash("echo one") + "<!--\nTripy: TEST: EXPECTED_STDOUT Start\n```\non[ef]\n```\n"
    "Tripy: TEST: EXPECTED_STDOUT End\n-->\n",
    "expected, for readers to see": bash("echo one") + "<!-- Tripy: EXPECTED_STDOUT Start -->\n```\none\n```\n"
    "<!-- Tripy: EXPECTED_STDOUT End -->\n",
    "expected is a regex for the beginning": bash("echo 'one (two) three'") + expected_stdout(r"(?s).*?\(two\)"),
    "both sides are dedented": bash("printf '  a\\n   b\\n'") + expected_stdout("    a\n     b"),
    "text": bash("echo one; echo two") + text("one", "two"),
    "text after a paragraph": bash("echo one") + "\nIt prints\n\n" + text("one"),
    "dots within a line": bash("echo 'took 0.53 s (fast)'") + text("took ... s (fast)"),
    "dots for any lines": bash("seq 9") + text("1", "...", "8", "9"),
    "dots for no line": bash("seq 2") + text("...", "1", "...", "2", "..."),
    "stderr is not stdout": bash("echo one; echo two >&2") + text("one"),
    "text in another section is no output": bash("echo one") + "# Tree\n" + text("two"),
    "ignored text is no output": bash("echo 1") + "<!-- Tripy: IGNORE Start -->\n"
    + text("2") + "<!-- Tripy: IGNORE End -->\n",
    "other labels are not run": bash("true") + "```python\nraise\n```\n```mermaid\nflowchart\n```\n",
    "console": "```console\n$ echo one \\\n>   two\none two\n$ echo three\nthree\n```\n",
    "must fail and does": XFAIL[0] + bash("exit 3") + XFAIL[1],
    "must fail, newer form": XFAIL[0].replace("y:", "y: TEST:") + bash("false") + XFAIL[1].replace("y:", "y: TEST:"),
    "must fail with this output": XFAIL[0] + bash("echo no; false") + text("no") + XFAIL[1],
    "a comment of another kind": "<!-- a note: see https://example.org, this is the End -->\n" + bash("true"),
    "a block between HTML": "<details>\n\n" + bash("true") + "\n</details>\n",
    "a marker that is only quoted": "Write `<!-- Tripy: XFAIL Start -->`\n" + bash("true"),
    "this python": bash(f"python -c 'import sys; sys.exit(sys.prefix != \"{sys.prefix}\")'", "pip --version"),
    "the readme's folder": bash("test -f README.md"),
    "standard input is empty": bash("test -z \"$(cat)\""),
    "nothing of pytest": bash('test -z "$PYTEST_CURRENT_TEST$PYTHONPATH"'),
}  # fmt: skip

FAIL = {
    "a command": (bash("echo out; echo err >&2; exit 3"), r"^exit status 3\n[\s\S]*out[\s\S]*err"),
    "not the last command": (bash("false", "true"), "^exit status 1"),
    "in a pipe": (bash("false | cat"), "^exit status 1"),
    "unknown command": (bash("no-such-command-here"), "^exit status 127"),
    "unlabelled, and no command": ("```\nonce upon a time\n```\n", "^exit status 127"),
    "status before output": (bash("echo one; false") + text("one"), "^exit status 1"),
    "status before wrong output": (bash("echo two; false") + text("one"), "^exit status 1"),
    "expected": (bash("echo two") + expected_stdout("one"), "^stdout is not what line 4 expects"),
    "expected at the beginning": (bash("echo two one") + expected_stdout("one"), "^stdout is not what"),
    "text": (bash("echo one") + text("two"), r"^stdout is not what line 4 expects\n--- expected\ntwo"),
    "text is all of it": (bash("seq 2") + text("1"), "^stdout is not what"),
    "text is no regex": (bash("echo 1x5") + text("1.5"), "^stdout is not what"),
    "dots stay in their line": (bash("echo a; echo b c") + text("a...c"), "^stdout is not what"),
    "the second of two": (bash("echo 1") + text("1") + expected_stdout("2"), "^stdout is not what line 7"),
    "console": ("```console\n$ echo one\ntwo\n```\n", "^stdout is not what"),
    "console without $": ("```console\ntrue\n```\n", "marks its commands with"),
    "must fail and passes": (XFAIL[0] + bash("true") + XFAIL[1], "^marked XFAIL, and it passes"),
    "must fail, of a missing command": (XFAIL[0] + bash("no-such-command") + XFAIL[1], "^marked XFAIL, but .* 127"),
    "must fail with other output": (XFAIL[0] + bash("echo no; false") + text("yes") + XFAIL[1], "^stdout is not"),
    "too slow": (bash("sleep 600"), "^still running after 0.5 s"),
    "must fail, and is killed": (XFAIL[0] + bash("kill -9 $$") + XFAIL[1], "^marked XFAIL, but exit status -9"),
    "must fail, and is no shell": (XFAIL[0] + bash("if then") + XFAIL[1], "^marked XFAIL, but .* the shell's own"),
    "must fail, and cannot go there": (XFAIL[0] + bash("cd nowhere") + XFAIL[1], "^marked XFAIL, but .* shell's own"),
    "must fail and is too slow": (XFAIL[0] + bash("sleep 600") + XFAIL[1], "^still running after 0.5 s"),
    "unknown marker": ("<!-- Tripy: XFIAL Start -->\n" + bash("true"), "^unknown marker 'XFIAL'"),
    "unknown kind of marker": ("<!-- Tripy: DOC: OMIT Start -->\n" + bash("true"), "^unknown marker 'Tripy: DOC"),
    "marker without a colon": ("<!-- Tripy XFAIL Start -->\n" + bash("false"), "^unknown marker"),
    "marker in lower case": ("<!-- needs: network -->\n" + bash("true"), "^unknown marker 'needs"),
    "a need in the singular": ("<!-- Need network -->\n" + bash("true"), "^unknown marker 'Need network'"),
    "a marker without its edge": ("<!-- XFAIL -->\n" + bash("true"), "^unknown marker 'XFAIL'"),
    "unknown need": ("<!-- Needs: a gpu -->\n" + bash("true"), "^unknown need 'a gpu': there are .*'nvidia gpu'"),
    "need before no block": (bash("true") + "<!-- Needs: network -->\n", "stands before no block"),
    "need before a text": ("<!-- Needs: network -->\n" + text("x") + bash("true"), "stands before no block"),
    "need before a section": ("<!-- Needs: network -->\n# Next\n" + bash("true"), "stands before no block"),
    "need of a block above all": ("<!-- Needs: the block above -->\n" + bash("true"), "and there is none"),
    "unclosed marker": (XFAIL[0] + bash("false"), "^XFAIL Start has no XFAIL End"),
    "marker closed twice": (XFAIL[0] + bash("false") + 2 * XFAIL[1], "^XFAIL End has no XFAIL Start"),
    "marker opened twice": (2 * XFAIL[0] + bash("false") + XFAIL[1], "^XFAIL is open since line 1"),
    "marker around nothing": (bash("true") + "".join(XFAIL), "^XFAIL encloses no block"),
    "marker in a line": ("See <!-- Tripy: XFAIL Start --> this\n" + bash("true"), "give it a line of its own"),
    "unclosed comment": (bash("true") + "\n<!-- Tripy: XFAIL Start\n", "^the comment is not closed"),
    "expected of nothing": (expected_stdout("x") + bash("true"), "follows no block of commands"),
    "expected of another section": (bash("true") + "# Next\n" + expected_stdout("x"), "follows no block of commands"),
    "expected is empty": (bash("true") + expected_stdout(""), "^EXPECTED_STDOUT is empty"),
    "expected is no regex": (bash("echo '('") + expected_stdout("("), "is no regular expression"),
    "an empty block": ("```bash\n\n```\n", "^the block is empty"),
    "a label that hides commands": ("```zsh\nfalse\n```\n" + bash("true"), "^unknown label 'zsh'"),
    "indented code": ("Run\n\n    false\n\n" + bash("true"), "^indented code would not be run"),
    "a fence inside HTML": ("<details>\n" + bash("false") + "</details>\n\n" + bash("true"), "^a fence right behind"),
    "a fence behind HTML": ("<p>x</p>\n```bash\nfalse\n```\n\n" + bash("true"), "^a fence right behind HTML"),
    "a pre that is not closed": (bash("true") + "\n<pre>\n\n" + bash("false"), "or <pre>, would not be run"),
    "a fence that is not closed": (bash("true") + "```python\nx\n\n# H\n```bash\nfalse\n", "^the fence is not closed"),
    "a label with a comma": ("```bash,copy\nfalse\n```\n" + bash("true"), "^unknown label 'bash,copy'"),
    "a label with a tab": ("```bash\ttitle\nfalse\n```\n", "^exit status 1"),
    "a slip in a label": ("```bsah\nfalse\n```\n" + bash("true"), "^unknown label 'bsah'"),
    "a byte order mark": ("\ufeff" + bash("false"), "^exit status 1"),
    "a second text": (bash("echo 1") + text("1") + text("2"), "^this text would be compared with nothing"),
    "text behind another fence": (bash("echo 1") + "```json\n1\n```\n" + text("2"), "^stdout is not what line 7"),
    "text behind a console's output": ("```console\n$ echo 1\n1\n```\n" + text("2"), "compared with nothing"),
    "nothing to run": ("# Title\n" + text("just words"), "^there is no block of commands"),
}  # fmt: skip

SKIP = {
    "ignored": ("<!-- Tripy: IGNORE Start -->\n" + bash("false") + "<!-- Tripy: IGNORE End -->\n", "marked IGNORE"),
    "minutes": ("<!-- Needs: minutes -->\n" + bash("false"), "needs minutes: run with --slow"),
    "missing": ("<!-- Needs: neuron core -->\n" + bash("false"), "needs neuron core"),
    "one of two": ("<!-- Needs: network, cloud ai 100 -->\n" + bash("false"), "needs cloud ai 100"),
    "must fail, elsewhere": (XFAIL[0] + "<!-- Needs: nvidia gpu -->\n" + bash("true") + XFAIL[1], "needs nvidia gpu"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch):
    for need in readme.NEEDS:
        monkeypatch.setitem(readme.NEEDS, need, lambda: False)
    monkeypatch.setitem(readme.NEEDS, "network", lambda: True)


@pytest.mark.parametrize("markdown", PASS.values(), ids=PASS)
def test_passes(tmp_path, markdown):
    assert [(outcome, why) for _, outcome, why in outcomes(tmp_path, markdown)] == [("passed", "")]


@pytest.mark.parametrize(("markdown", "reason"), FAIL.values(), ids=FAIL)
def test_fails_for_its_reason(tmp_path, markdown, reason):
    limit_s = 0.5 if "sleep 600" in markdown else readme.LIMIT_S
    failed = [why for _, outcome, why in outcomes(tmp_path, markdown, limit_s=limit_s) if outcome == "failed"]
    assert failed
    assert re.search(reason, failed[0]), failed


@pytest.mark.parametrize(("markdown", "reason"), SKIP.values(), ids=SKIP)
def test_skips_for_its_reason(tmp_path, markdown, reason):
    assert [(outcome, why) for _, outcome, why in outcomes(tmp_path, markdown)] == [("skipped", reason)]


def test_the_needs_that_are_met_run(tmp_path):
    markdown = "<!-- Needs: network, minutes -->\n" + bash("echo 1") + text("1")
    assert outcomes(tmp_path, markdown, slow=True) == [(2, "passed", "")]


def test_models_of_the_hub_are_there_for_the_blocks_that_declare_them(tmp_path, monkeypatch):
    monkeypatch.setitem(readme.NEEDS, "gpt2 weights", lambda: True)
    monkeypatch.setenv("HF_HUB_CACHE", "/the/cache")
    show = bash('echo "$HF_HUB_CACHE"')
    markdown = show + text("/dev/null") + "<!-- Needs: gpt2 weights -->\n" + show + text("/the/cache")
    assert [outcome for _, outcome, _ in outcomes(tmp_path, markdown)] == ["passed", "passed"]


def test_a_block_runs_once_before_the_one_that_needs_it(tmp_path):
    markdown = bash("echo x >> made") + "<!-- Needs: the block above -->\n" + bash("cat made") + text("x")
    path = tmp_path / "README.md"
    path.write_text(markdown, encoding="utf-8")
    first, second = parse(path)
    runner = Runner()
    assert runner.outcome(second) == ("passed", "")
    assert runner.outcome(first) == ("passed", "")
    assert (tmp_path / "made").read_text(encoding="utf-8") == "x\n"


def test_a_block_that_needs_a_skipped_one_is_skipped_by_the_same_name(tmp_path):
    chained = "<!-- Needs: the block above -->\n" + bash("false")
    skipped = outcomes(tmp_path, "<!-- Needs: neuron core -->\n" + bash("true") + 2 * chained)
    assert [(outcome, why) for _, outcome, why in skipped] == 3 * [("skipped", "needs neuron core")]


def test_a_block_that_needs_a_failed_one_fails_by_its_line(tmp_path):
    failed = outcomes(tmp_path, bash("false") + "<!-- Needs: the block above -->\n" + bash("true"))
    assert failed[1] == (5, "failed", "the block above, line 1, failed")


# says, when it is asked to end, that it was still there
STAYS = "(trap 'touch was-there; exit' TERM; touch ready; while :; do sleep 0.1; done) & echo $! > pid"
STAYS = bash(STAYS, "until test -f ready; do sleep 0.1; done")


def is_gone(tmp_path):
    """Whether the process of STAYS was ended before it was asked to."""
    pid = int((tmp_path / "pid").read_text(encoding="utf-8"))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        until = time.monotonic() + 120
        while state := subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True).stdout.strip():
            if state.startswith(b"Z"):  # nobody has asked yet how it ended
                break
            assert time.monotonic() < until, "it neither was gone nor goes"
            time.sleep(0.01)
    return not (tmp_path / "was-there").exists()


def test_what_a_block_left_running_is_gone_afterwards(tmp_path):
    assert outcomes(tmp_path, STAYS) == [(1, "passed", "")]
    assert is_gone(tmp_path)


def test_a_block_that_is_too_slow_is_gone_afterwards(tmp_path, monkeypatch):
    """Its time is up as soon as its process stays."""
    wait = subprocess.Popen.wait

    def wait_until_ready(shell, timeout=None):
        if timeout is None:
            return wait(shell)
        while not (tmp_path / "ready").exists():
            assert shell.poll() is None
            time.sleep(0.01)
        raise subprocess.TimeoutExpired(shell.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_until_ready)
    markdown = STAYS.replace("done\n```", "done; sleep 600\n```")
    [(_, outcome, why)] = outcomes(tmp_path, markdown, limit_s=7)
    assert outcome == "failed" and why.startswith("still running after 7 s\n")
    monkeypatch.undo()
    assert is_gone(tmp_path)


def test_a_daemon_holds_nothing_up(tmp_path):
    """It has a session of its own, and this block's stdout, as long as it lives."""
    markdown = bash("setsid sleep 600 & echo $! > pid; echo on") + text("on")
    assert [outcome for _, outcome, _ in outcomes(tmp_path, markdown)] == ["passed"]
    os.kill(int((tmp_path / "pid").read_text(encoding="utf-8")), signal.SIGKILL)


def test_minutes_have_a_limit_of_their_own(tmp_path, monkeypatch):
    waits = []
    wait = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", lambda shell, timeout=None: waits.append(timeout) or wait(shell))
    markdown = "<!-- Needs: minutes -->\n" + bash("true") + bash("true")
    outcomes(tmp_path, markdown, slow=True, limit_s=7)
    assert [seconds for seconds in waits if seconds] == [readme.SLOW_LIMIT_S, 7]
    assert readme.SLOW_LIMIT_S >= 3600


def test_dots_on_many_lines_do_not_take_for_ever(tmp_path):
    """Two seconds at most; an attempt with every set of line ends would take years."""
    markdown = bash("seq 2000") + text(*["..."] * 20, "never")

    def stop(*_):
        raise TimeoutError("the lines are compared for over a minute")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    try:
        assert outcomes(tmp_path, markdown)[0][1] == "failed"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_every_need_can_be_asked_on_any_machine(monkeypatch):
    monkeypatch.undo()
    assert all(isinstance(has(), bool) for has in readme.NEEDS.values())


def test_the_source_documents_markup_is_understood(tmp_path):
    """The layout of Tripy's own README: steps in a list, hidden output, a step that must fail."""
    markdown = """# Title
1. Install:

    ```bash
    true
    ```

2. **[Optional]** Fix the seed:

    ```bash
    echo "loading"; echo "Do people really like using ONNX? Yes"
    ```

    <!-- Tripy: EXPECTED_STDOUT Start -->
    <!--
    ```
    (?s).*?
    Do people really like using ONNX\\?.+
    ```
     -->
    <!-- Tripy: EXPECTED_STDOUT End -->

<!-- Tripy: XFAIL Start -->
3. fp8:

    ```bash
    false
    ```
<!-- Tripy: XFAIL End -->
"""
    assert outcomes(tmp_path, markdown) == [(4, "passed", ""), (10, "passed", ""), (26, "passed", "")]


# -- as pytest shows it


def run_pytest(tmp_path, markdown, *arguments):
    (tmp_path / "README.md").write_text(markdown, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "tests/docs/test_readme.py", "-v", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", env=os.environ | {"COLUMNS": "200"})


def test_each_block_has_its_line_for_an_id_and_names_what_it_left(tmp_path):
    markdown = (
        bash("echo > kept; rm README.bak; mkdir -p out/a; touch out/a/b out/c")
        + bash("false")
        + "<!-- Needs: minutes -->\n"
        + bash("touch slow")
    )
    (tmp_path / "README.bak").touch()
    readme_option = f"--readme={tmp_path}/README.md"
    result = run_pytest(tmp_path, markdown, readme_option)
    assert result.returncode == 1
    assert "test_block[README.md:1] PASSED" in result.stdout
    assert "test_block[README.md:4] FAILED" in result.stdout
    assert "test_block[README.md:8] SKIPPED (needs minutes: run with --slow)" in result.stdout
    assert "README.md:1: README.bak, kept, out/ (2 files)\n" in result.stdout
    assert not (tmp_path / "slow").exists()
    (tmp_path / "README.bak").touch()
    assert run_pytest(tmp_path, markdown, readme_option, "--slow", "-k", "README.md:8").returncode == 0
    assert (tmp_path / "slow").exists()


def test_a_readme_that_is_missing_is_an_error(tmp_path):
    result = run_pytest(tmp_path, "", f"--readme={tmp_path}/nothing.md")
    assert result.returncode == 4
    assert "nothing.md: there is no such file" in result.stderr
