"""Puts what make bench and tests/contract found last onto the front page: its tables, and the pictures beside it.

python tests/tools/front_page.py

They stand between `<!-- parity -->` (bench, limits) and `<!-- end -->` in README.md, and nobody writes them by hand.
"""

import json
import re
import shutil
import sys
from pathlib import Path

from tests.conventions.rules import ROOT
from tests.tools import roofline

RESULTS, FIGURES = ROOT / "results", ROOT / "tests" / "tools" / "figures"
KEPT = [f"bench/{name}" for name in ("bench.json", "bench.md", "bench.png", "roofline.md")]
KEPT += ["parity/parity.md", "parity/parity.png"]


def parts(figures: Path) -> dict[str, str]:
    """What stands between the markers, by their names."""
    kept = json.loads((figures / "bench.json").read_text(encoding="utf-8"))
    here = kept["machine"]
    limits = roofline.rows(roofline.devices(here))
    limits = [row for row in limits if row["precision"] in ("float32", "float16", roofline.HALF)]
    measured = f"Measured on {here['cores']} cores ({here['cpu']}), which at their best read "
    measured += f"{here['bandwidth'] / 1e9:.1f} GB/s and multiply {here['float32'] / 1e9:,.0f} GFLOP/s in float32:"
    return {
        "parity": (figures / "parity.md").read_text(encoding="utf-8"),
        "bench": f"{measured}\n\n{(figures / 'bench.md').read_text(encoding='utf-8')}",
        "limits": roofline.table(limits, ["gpt2", "gpt2-xl"]),
    }


def filled(page: str, parts: dict[str, str]) -> str:
    for name, text in parts.items():
        whole = f"<!-- {name} -->\n\n{text}\n<!-- end -->"
        page, count = re.subn(f"<!-- {name} -->.*?<!-- end -->", lambda _, whole=whole: whole, page, flags=re.S)
        if count != 1:
            raise ValueError(f"README.md has {count} places between <!-- {name} --> and <!-- end -->, 1 is expected")
    return page


def main(root: Path) -> int:
    FIGURES.mkdir(exist_ok=True)
    for found in map(RESULTS.joinpath, KEPT):
        if found.is_file():
            shutil.copy(found, FIGURES)
        elif not (FIGURES / found.name).is_file():
            print(f"{found} is missing: run make bench, and tox run -e parity", file=sys.stderr)
            return 2
    page = root / "README.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), parts(FIGURES)), encoding="utf-8")
    print(f"{page} and {FIGURES} hold what was found last")
    return 0


if __name__ == "__main__":
    sys.exit(main(ROOT))
