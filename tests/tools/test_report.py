"""report.py, on a project made here; tests/contract runs it for a real one."""

import json
import sys

import pytest

from tests.tools import report

EXAMPLE = """import sys
print("gpt2-nano (3.6M parameters) on abacus: beads 1.0")
print(*sys.argv[1:], {place!r})
sys.exit({status})
"""
BENCH = """import json, sys
print("decode")
print(json.dumps({"tokens_per_s": 7, "device": sys.argv[2]}))
"""


@pytest.fixture
def write_report(tmp_path, monkeypatch, capsys):
    """write_report(status of the example, flags...) -> (exit status, the report, its page, what was printed)"""
    folder = tmp_path / "alpha_gpt"
    folder.mkdir()
    (folder / "bench.py").write_text(BENCH, encoding="utf-8")
    (folder / "requirements.txt").write_text("pytest==1.0  # why\n-r other.txt\nnowhere==2\n", encoding="utf-8")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "TOOLS", ((sys.executable, "-c", "print('one abacus')"), ("no-such-tool",)))
    monkeypatch.chdir(tmp_path)

    def write_report(status, *flags):
        (folder / "example.py").write_text(EXAMPLE.format(place=str(folder), status=status), encoding="utf-8")
        ended = report.main(["alpha_gpt", *flags])
        found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        return ended, found, (tmp_path / "report.md").read_text(encoding="utf-8"), capsys.readouterr().out

    return write_report


def test_a_report_holds_the_device_the_versions_the_figures_and_what_was_printed(write_report, tmp_path):
    status, found, page, printed = write_report(0, "--device=abacus")
    assert (status, found["device"], found["verdict"]) == (0, "abacus", "as expected")
    assert found["packages"] == {"pytest": pytest.__version__}
    assert found["figures"] == {"tokens_per_s": 7, "device": "--device=abacus"}
    assert [run["command"].split()[1] for run in found["runs"]] == ["example.py", "example.py", "bench.py"]
    assert "--verify" in found["runs"][0]["command"] and "one abacus" in page
    assert page.startswith("# alpha_gpt on abacus\n") and printed.splitlines()[-1].startswith(
        "alpha_gpt on abacus: as exp"
    )
    assert str(tmp_path) not in page and str(tmp_path) not in json.dumps(found)


def test_a_failure_is_the_verdict_and_the_report_is_written(write_report):
    status, found, page, _ = write_report(3)
    assert (status, found["verdict"]) == (1, "NOT as expected")
    assert [run["status"] for run in found["runs"]] == [3, 3, 0] and "status 3" in page


def test_a_project_that_is_not_there_is_refused(write_report, capsys):
    with pytest.raises(SystemExit) as caught:
        report.main(["beta_gpt"])
    assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1
