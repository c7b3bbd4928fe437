"""The flags that every example has, spelled with - and with _."""

import pytest

from tests.conventions.rules import ROOT, example_of
from tests.tools.examples import EXAMPLES, read_dump

WORDS = "--model=gpt2-nano --prompt=ROMEO: --max-new-tokens=6 --temperature=0.9 --top-k=20 --top-p=0.9 --seed=3"
WORDS += " --dtype=float32 --device=cpu --ignore-eos --dump=dump.npz"


@pytest.mark.parametrize("project", EXAMPLES)
def test_the_common_flags_work_in_every_example(project, served, tmp_path):
    dumps = []
    for words in WORDS, WORDS.replace("-p=", "_p=").replace("-k=", "_k=").replace("-new-", "_new_"):
        answer = served(project).run(example_of(ROOT, project), words.split(), tmp_path)
        assert answer.status == 0, answer.stderr
        dumps.append(read_dump(tmp_path / "dump.npz"))
        (tmp_path / "dump.npz").unlink()
    assert dumps[0]["tokens"].tolist() == dumps[1]["tokens"].tolist() and len(dumps[0]["tokens"]) == 6
