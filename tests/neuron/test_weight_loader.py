"""Which files a checkpoint's fingerprint covers. What a checkpoint may hold is in tests/contract/odd.py."""

import json

import pytest

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
