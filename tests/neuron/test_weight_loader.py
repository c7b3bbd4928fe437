"""Which files a checkpoint's fingerprint covers, and what a start copies and imports.

What a checkpoint may hold is in tests/contract/odd.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neuron_nanogpt import kernels, weight_loader
from neuron_nanogpt.weight_loader import fingerprint

INDEX, SHARDS = "model.safetensors.index.json", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize("weights", [["model.safetensors"], [INDEX, *SHARDS]], ids=["whole", "shards"])
def test_the_fingerprint_covers_each_file_that_is_read_and_no_other(weights, tmp_path):
    for name in "config.json", *weights, "model_ema.safetensors":
        (tmp_path / name).write_text("a", encoding="utf-8")
    if INDEX in weights:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict(enumerate(SHARDS))}), encoding="utf-8")
    seen = [fingerprint(tmp_path)]
    for name in "config.json", *weights:
        (tmp_path / name).write_text((tmp_path / name).read_text(encoding="utf-8") + " ", encoding="utf-8")
        seen.append(fingerprint(tmp_path))
    assert len({*seen}) == len(seen)
    (tmp_path / "model_ema.safetensors").unlink()
    assert fingerprint(tmp_path) == seen[-1]


def mapped_file(address):
    """The file that this address of the process is mapped from."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, *_, name = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return name
    return None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_only_the_head_is_copied_on_the_cpu(tiny):
    """The other weights stay in the file's pages, those of the embedding too, which the head does not fill."""
    gpt = weight_loader.load(tiny[0])
    assert gpt.lm_head.weight.data_ptr() != gpt.wte.weight.data_ptr()
    kernels.prepare(gpt)
    for name, parameter in gpt.named_parameters():
        copied = name == "lm_head.weight"
        file = mapped_file(parameter.data_ptr())
        assert copied != str(file).endswith("model.safetensors"), name


@pytest.mark.skipif(torch.__version__.startswith("2.9."), reason="torch 2.9 imports sympy to make shapes")
def test_a_start_imports_no_compiler(tiny):
    """torch._dynamo and sympy take longer to import than a checkpoint to load."""
    code = "from neuron_nanogpt import bench, engine; import sys; from pathlib import Path\n"
    code += f"bench.greedy(bench.load(Path({str(tiny[0])!r}), 'float32', 'cpu'), [1], 1)\n"
    code += "print({'sympy', 'torch._dynamo'} & {*sys.modules})"
    environment = os.environ | {"PYTHONPATH": str(Path(weight_loader.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-c", code]
    for _ in range(2):  # the first time its graphs are traced
        out = subprocess.run(command, env=environment, check=True, capture_output=True, encoding="utf-8").stdout
        assert out.splitlines()[-1] == "set()"
