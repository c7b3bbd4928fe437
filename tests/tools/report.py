"""A report of a project on this machine's hardware, to attach to an issue.

    python tests/tools/report.py neuron_nanogpt [--device=neuron]

Run it in the environment that runs the project: it needs nothing else. It runs the example with --verify, the example,
and bench.py, and writes report.json and report.md to the current folder. Both hold what the commands printed and the
versions of packages and drivers; no name of the machine or of its user.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ("example.py", "run_model.py", "sample.py")
# what a vendor's tool says of its devices and its driver
TOOLS = (
    ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
    ["neuron-ls"],
    ["/opt/qti-aic/tools/qaic-util", "-q"],
)


def run(command: list[str], folder: Path) -> dict:
    """What a command printed, its exit status and its time."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace")
    took_s = round(time.perf_counter() - start, 1)
    words = ["python" if word == sys.executable else word for word in command]
    output = {"stdout": private(done.stdout), "stderr": private(done.stderr)}
    return {"command": " ".join(words), "status": done.returncode, "seconds": took_s} | output


def private(text: str) -> str:
    """Without the folders that name a user."""
    return text.replace(str(ROOT), ".").replace(str(Path.home()), "~")


def versions(folder: Path) -> dict[str, str]:
    """Of the packages that the project's requirements name, those that are installed."""
    lines = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("requirements*.txt")))
    found = {}
    for name in sorted({*re.findall(r"^([A-Za-z][\w.-]*)", lines, re.M)}):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(describe, check=True, capture_output=True, encoding="utf-8").stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def report(project: str, device: str) -> dict:
    folder = ROOT / project
    example = next(name for name in EXAMPLES if (folder / name).is_file())
    common = ["--model=gpt2-nano", f"--device={device}"]
    scripts = [[example, "--verify"], [example, "--temperature=0", "--max-new-tokens=32"], ["bench.py"]]
    runs = []
    for script, *flags in scripts:
        runs.append(run([sys.executable, script, *common, *flags], folder))
        print(f"{runs[-1]['command']}: status {runs[-1]['status']}, {runs[-1]['seconds']} s", flush=True)
    found = re.search(r"^\S+ \(.*?\) on (.+?):", runs[0]["stdout"], re.M)
    last_line = runs[2]["stdout"].rstrip().rpartition("\n")[2]
    return {
        "project": project,
        "device": found[1] if found else "none: the example did not start",
        "verdict": "as expected" if not any(run["status"] for run in runs) else "NOT as expected",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}",
        "packages": versions(folder),
        "devices": {tool[0]: run(tool, folder)["stdout"] for tool in TOOLS if shutil.which(tool[0])},
        "figures": json.loads(last_line) if runs[2]["status"] == 0 else None,
        "runs": runs,
    }


def markdown(found: dict) -> str:
    about = {key: found[key] for key in ("device", "verdict", "date", "commit", "system")}
    about["packages"] = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    lines = [f"# {found['project']} on {found['device']}", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in about.items()]
    for tool, said in found["devices"].items():
        lines += ["", f"`{tool}`:", "", "```text", said.rstrip(), "```"]
    for done in found["runs"]:
        printed = "\n".join(filter(None, [done["stdout"].rstrip(), done["stderr"].rstrip()]))
        lines += [
            "",
            f"`{done['command']}`: status {done['status']}, {done['seconds']} s",
            "",
            "```text",
            printed,
            "```",
        ]
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> int:
    projects = sorted(path.parent.name for name in EXAMPLES for path in ROOT.glob(f"*/{name}"))
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("project", choices=projects)
    parser.add_argument("--device", default="auto", help="as the example takes it (default: %(default)s)")
    args = parser.parse_args(argv)
    found = report(args.project, args.device)
    Path("report.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    Path("report.md").write_text(markdown(found), encoding="utf-8")
    print(f"{found['project']} on {found['device']}: {found['verdict']}. report.json and report.md are written.")
    return int(found["verdict"] != "as expected")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
