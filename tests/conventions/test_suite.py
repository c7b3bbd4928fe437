"""Each way to deselect a test or to ignore its outcome, in a house that is otherwise in order."""

import pytest

from tests.conventions.made_up import write
from tests.conventions.rules import complaints

# of each file: what stands there, what a hand puts in its place, and what the house says of it
FAULTS = {
    "tox.ini": [
        (
            "--readme alpha_gpt2/README.md",
            "--readme alpha_gpt2/README.md -k fast",
            "testenv:alpha does not run all tests",
        ),
        ("tests/alpha tests/docs", "tests/alpha tests/docs -m 'not slow'", "does not run all tests as they are"),
        ("alpha_gpt2/README.md {", "alpha_gpt2/README.md --deselect=x {", "testenv:alpha does not run all"),
        ("alpha_gpt2/README.md {", "alpha_gpt2/README.md --ignore tests/alpha/x.py {", "testenv:alpha does not run"),
        ("alpha_gpt2/README.md {", "alpha_gpt2/README.md --lf {", "testenv:alpha does not run"),
        ("alpha_gpt2/README.md {", "alpha_gpt2/README.md --co {", "testenv:alpha does not run all"),
        ("{posargs}\n[testenv:beta]", "{posargs:-k fast}\n[testenv:beta]", "does not run all"),
        ("alpha_gpt2/README.md {", "alpha_gpt2/README.md -p no:python {", "does not run all"),
        ("pytest tests/alpha", "- pytest tests/alpha", "testenv:alpha ignores the outcome of - pytest"),
        ("pytest tests/alpha", "-pytest tests/alpha", "ignores the outcome of -pytest"),
        ("pytest tests/alpha", "! pytest tests/alpha", "ignores the outcome of ! pytest"),
        ("commands = pytest tests/alpha", "commands = sh -c pytest tests/alpha", "does not run all tests"),
        (
            "commands = pytest tests/alpha",
            "commands = echo pytest tests/alpha",
            "does not run all tests as they are: echo",
        ),
        (
            "commands = pytest tests/alpha",
            "ignore_outcome = true\ncommands = pytest tests/alpha",
            "sets ignore_outcome",
        ),
        ("commands = pytest tests/alpha", "ignore_errors = true\ncommands = pytest tests/alpha", "sets ignore_errors"),
        ("commands = pytest tests/alpha", "platform = win32\ncommands = pytest tests/alpha", "sets platform"),
        (
            "commands = pytest tests/alpha",
            "allowlist_externals = sh\ncommands = pytest tests/alpha",
            "sets allowlist_externals",
        ),
        (
            "commands = pytest tests/alpha",
            "set_env = PYTEST_ADDOPTS = -k x\ncommands = pytest tests/alpha",
            "options out of sight",
        ),
        (
            "commands = pytest tests/alpha",
            "pass_env = CI, PYTEST_*\ncommands = pytest tests/alpha",
            "gives pytest options out of sight",
        ),
        ("[testenv:alpha]", "[pytest]\naddopts = -x\n[testenv:alpha]", "pytest gives pytest"),
        ("env_list", "skip_missing_interpreters = true\nenv_list", "skips environments"),
        ("beta, parity", "beta", "tox.ini's env_list lacks parity"),
        ("lint, shared", "lint", "tox.ini's env_list lacks shared"),
        ("lint, shared", "shared", "tox.ini's env_list lacks lint"),
        ("ruff check", "ruff check --exit-zero", "testenv:lint ignores the outcome of ruff check --exit-zero"),
        ("tests/conventions ", "", "tests/conventions is in no command of env_list"),
    ],
    "pyproject.toml": [
        ('"-ra"', '"-ra", "-m", "not slow"', "pyproject.toml gives pytest -m"),
        ('["--import-mode=importlib", "--strict-markers", "-ra"]', '"-ra -k x"', "pytest -k"),
        ("testpaths", 'python_files = ["x.py"]\ntestpaths', "sets pytest's python_files"),
        ("testpaths", 'norecursedirs = ["alpha"]\ntestpaths', "sets pytest's norecursedirs"),
        ("strict = true", "strict = false", "must set pytest's xfail_strict"),
    ],
    "pytest.ini": [
        ("", "[pytest]\n", "pytest.ini would replace"),
    ],
    "tests/alpha/pytest.ini": [
        ("", "[pytest]\n", "tests/alpha/pytest.ini would replace"),
    ],
    "tests/alpha/conftest.py": [
        ("", "collect_ignore = ['test_model.py']", "has collect_ignore"),
        ("", "def pytest_sessionfinish(session): ...", "has pytest_sessionfinish"),
    ],
    "tests/conftest.py": [
        ("", "collect_ignore_glob: list = ['*']", "has collect_ignore_glob"),
        ("", "def pytest_collection_modifyitems(items): del items[1:]", "pytest_collection_mod"),
    ],
    "tests/alpha/test_model.py": [
        ("import", "pytest.importorskip('torch');import", "skips without torch, which no requirements of alpha pin"),
        ("def test", "@pytest.mark.skip\ndef test", "has pytest.mark.skip, which"),
        ("def test", "@pytest.mark.skip(reason='')\ndef test", "pytest.mark.skip"),
        ("import", "pytestmark = pytest.mark.skip;import", "tests/alpha/test_model.py:1 has pytest.mark.skip"),
        ("import", "x = pytest.mark.skipif(True);import", "tests/alpha/test_model.py:1 has pytest.mark.skipif w"),
        ("import", "x = pytest.mark.xfail;import", "tests/alpha/test_model.py:1 has pytest.mark.xfail"),
        ("import", "pytest.skip('', allow_module_level=True);import", "tests/alpha/test_model.py:1 has allow"),
        ("import", "__test__ = False;import", "tests/alpha/test_model.py:1 has __test__"),
    ],
    "Makefile": [
        ("\t$(TOX) run-p", "\t-$(TOX) run-p", "Makefile's test ignores the outcome of -$(TOX)"),
        ("\t$(TOX) run-p", "\t@-$(TOX) run-p", "Makefile's test ignores the outcome of @-"),
        ("spinner", "spinner || true", "Makefile's test ignores the outcome"),
        ("spinner", "spinner ; true", "Makefile's test ignores the outcome"),
        ("spinner", "spinner | tee log", "Makefile's test ignores the outcome"),
        ("spinner", "spinner &", "Makefile's test ignores the outcome"),
        ("\t@$(TOX) run", "\t@-$(TOX) run", "Makefile's bench ignores the outcome"),
        ("bench:", ".IGNORE: test\nbench:", "Makefile's .IGNORE ignores outcomes"),
        ("bench:", ".ONESHELL:\nbench:", "Makefile's .ONESHELL ignores outcomes"),
        ("JOBS", "MAKEFLAGS += -i\nJOBS", "Makefile sets a variable"),
        ("JOBS", "SHELL = /bin/true\nJOBS", "Makefile sets a variable"),
        ("JOBS", "export TOX_SKIP_ENV = parity\nJOBS", "Makefile sets a variable"),
        ("run-parallel -p", "run-parallel -e shared -p", "Makefile's test does not run all"),
        ("?= 2", "?= 2 -e shared", "Makefile's test does not run all"),
        ("run-parallel -p", "run-parallel --skip-env=parity -p", "Makefile's test does not run"),
        ("spinner", "spinner -- -k x", "Makefile's test does not run all"),
        ("spinner", "spinner -x testenv.commands=true", "Makefile's test does not run all"),
        ("spinner", "spinner --notest", "Makefile's test does not run all"),
        ("test: $(TOX)\n\t$(TOX) run", "test: $(TOX)\n\techo run", "Makefile's test must run tox"),
    ],
    ".ci/run": [
        ("set -euo", "set -uo", ".ci/run must begin with set -e"),
        ("make test", "set +e\nmake test", ".ci/run ignores the outcome of set +e"),
        ("make test", "# make test", ".ci/run does not run README.md's make test"),
        ("make demo\n", "", ".ci/run does not run README.md's make demo"),
        ("-e alpha", "-e alpha || true", ".ci/run ignores the outcome of ONEDNN"),
        ("make test", "exit\nmake test", ".ci/run ignores the outcome of exit"),
        ("-e alpha", "-e alpha &", ".ci/run ignores the outcome of ONEDNN"),
        ("ONEDNN_MAX", "TOX_SKIP_ENV=parity ONEDNN_MAX", ".ci/run ignores the outcome of TOX_SKIP"),
    ],
    ".github/workflows/ci.yml": [
        ("- run: .ci/run", "- run: .ci/run\n        continue-on-error: true", "ignores the"),
        ("cat report.md", "cat report.md || true", "ci.yml ignores the outcome of run"),
        ("- run: .ci/run", "- run: make", "no workflow runs .ci/run"),
    ],
}


CASES = {f"{path}: {after}": (path, before, after, says) for path in FAULTS for before, after, says in FAULTS[path]}


@pytest.mark.parametrize(("path", "before", "after", "says"), CASES.values(), ids=CASES)
def test_each_fault_is_named(made_up, path, before, after, says):
    text = (made_up / path).read_text(encoding="utf-8") if before else ""
    assert text.count(before) >= 1
    write(made_up / path, text.replace(before, after, 1))
    found = complaints(made_up)
    assert any(says in line for line in found), found


def test_what_chooses_no_tests_is_allowed(made_up):
    options = "-q --durations=10 -n 2 -p no:cacheprovider --tb=short"
    text = (made_up / "tox.ini").read_text(encoding="utf-8")
    write(made_up / "tox.ini", text.replace("{posargs}", f"{options} {{posargs}}"))
    write(made_up / "tests/alpha/test_numpy.py", "import pytest\npytest.importorskip('numpy')")
    write(made_up / "tests/conftest.py", "def pytest_collection_modifyitems(items):\n for item in items: print(item)")
    write(made_up / "tests/alpha/conftest.py", "import pytest\nx = pytest.mark.skipif(not engine, reason='none')")
    assert complaints(made_up) == []
