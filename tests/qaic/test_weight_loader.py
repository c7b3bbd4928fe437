"""Which files a checkpoint's digest covers. What a checkpoint may hold is in tests/contract/odd.py."""

import json

import pytest

from qaic_gpt2.weight_loader import digest

INDEX, SHARDS = "model.safetensors.index.json", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize("weights", [["model.safetensors"], [INDEX, *SHARDS]], ids=["whole", "shards"])
def test_the_digest_covers_each_file_that_is_read_and_no_other(weights, tmp_path):
    for name in "config.json", *weights, "model_ema.safetensors":
        (tmp_path / name).write_text("{}", encoding="utf-8")
    if INDEX in weights:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict(enumerate(SHARDS))}), encoding="utf-8")
    seen = [digest(tmp_path)]
    for name in weights:
        (tmp_path / name).write_text((tmp_path / name).read_text(encoding="utf-8") + " ", encoding="utf-8")
        seen.append(digest(tmp_path))
    (tmp_path / "config.json").write_text('{"n_head": 6}', encoding="utf-8")  # the same shapes, other logits
    seen.append(digest(tmp_path))
    assert len({*seen}) == len(seen)
    (tmp_path / "model_ema.safetensors").unlink()
    assert digest(tmp_path) == seen[-1]
