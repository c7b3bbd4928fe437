"""One wrong line in a project turns parity red, and the message names the project.

Each fault is put into a copy of a project, whose example then runs as the project's own does.
"""

from typing import NamedTuple

import pytest

from tests.contract.parity import LIMIT, Case, compare, table
from tests.contract.places import copy_of
from tests.tools.examples import EXAMPLES, ask

SHORT = Case("short", "To be, or not to be", 24)


class Fault(NamedTuple):
    project: str
    kind: str
    file: str
    right: str
    wrong: str


SHIFTED, ERF, TRANSPOSED = "a shifted position", "erf for tanh in GELU", "a transposed weight"
FAULTS = [
    Fault("jax_nanogpt", SHIFTED, "model.py", "in_dim(wpe, start,", "in_dim(wpe, start + 1,"),
    Fault("jax_nanogpt", ERF, "model.py", "approximate=True", "approximate=False"),
    Fault(
        "jax_nanogpt",
        TRANSPOSED,
        "weight_loader.py",
        "jnp.asarray(tensors.pop(name), DTYPES[dtype])",
        "jnp.asarray(t.T if len({*(t := tensors.pop(name)).shape}) == 1 else t, DTYPES[dtype])",
    ),
    # with the cache alone: the prompt is read as it should be
    Fault("neuron_nanogpt", SHIFTED, "model.py", "else positions.view(B, 1)", "else positions.view(B, 1) + 1"),
    Fault("neuron_nanogpt", ERF, "model.py", 'approximate="tanh"', 'approximate="none"'),
    Fault(
        "neuron_nanogpt",
        TRANSPOSED,
        "weight_loader.py",
        "(TRANSPOSED) else tensor",
        "(TRANSPOSED) and len({*tensor.shape}) == 2 else tensor",
    ),
    Fault("qaic_gpt2", SHIFTED, "model.py", "position_ids.clamp(min=0)", "(position_ids + 1).clamp(min=0)"),
    Fault(
        "qaic_gpt2",
        ERF,
        "model.py",
        "x = x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))",
        "x = nn.functional.gelu(x)",
    ),
    Fault(
        "qaic_gpt2",
        TRANSPOSED,
        "weight_loader.py",
        "{name: tensor.to(",
        "{name: (tensor.t().contiguous() if len(tensor.shape) == 2 and len({*tensor.shape}) == 1 else tensor).to(",
    ),
    Fault("tripy_nanogpt", SHIFTED, "model.py", "self.wpe(positions)", "self.wpe(positions + 1)"),
    Fault("tripy_nanogpt", ERF, "model.py", "gelu(self.c_fc(x))", "tp.gelu(self.c_fc(x))"),
    Fault("tripy_nanogpt", TRANSPOSED, "weight_loader.py", "and tensor.ndim == 2", "and len({*tensor.shape}) == 2"),
]


def test_every_project_has_each_kind_of_fault():
    wanted = {(project, kind) for project in EXAMPLES for kind in (SHIFTED, ERF, TRANSPOSED)}
    lacking = sorted(wanted - {(fault.project, fault.kind) for fault in FAULTS})
    assert not lacking, f"FAULTS lacks {lacking}: name a line of the project, and what makes it wrong"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.project}-{fault.kind.replace(' ', '-')}")
def test_one_wrong_line_is_found_and_its_project_named(fault, referee, pythons, tmp_path):
    root = copy_of(fault.project, tmp_path / "root")
    file = root / fault.project / fault.file
    text = file.read_text(encoding="utf-8")
    assert text.count(fault.right) == 1, f"{fault.project}/{fault.file} has changed: this fault needs another line"
    file.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")
    settings = {"model": referee.folder, "prompt": SHORT.prompt, "new_tokens": SHORT.new_tokens}
    answer = ask(pythons(fault.project), root, fault.project, tmp_path, **settings)
    outcome = compare(fault.project, "gpt2-nano", SHORT, answer, referee)
    print(*outcome.errors, sep="\n")
    # it ran to its end, and what it wrote is wrong
    assert outcome.new_tokens == SHORT.new_tokens and outcome.worst > 10 * LIMIT
    assert "logits differ by up to" in outcome.errors[-1]
    assert all(error.startswith(f"{fault.project} (gpt2-nano, ") for error in outcome.errors)
    assert f"| {fault.project} | 1 | 24 | DISAGREES in 1 of 1 texts |" in table([outcome])
