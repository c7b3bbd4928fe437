"""Quantized weights: computed once by ModelOpt, then cached in a safetensors file next to the executables."""

from functools import partial
from importlib.metadata import version
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save

from tripy_nanogpt.files import fingerprint, known_hashes, write_file
from tripy_nanogpt.model import int4_block
from tripy_nanogpt.quantization import CALIBRATED, CNN, OFFLINE, calibration_loop, offline, run_modelopt
from tripy_nanogpt.weight_loader import hashed_files, quantized_state, read_model_hf

VOCABULARIES = "meta.json", "vocab.json", "merges.txt", "tokenizer.json"


def prepare(folder, config, dataset_name, cache):
    """(cache key, a function that gives the quantized state, what calibrated it or "").

    What the user can get wrong is read here; ModelOpt runs when the function is called.
    """
    if config.quant_mode.startswith("int4"):
        int4_block(config)  # a ValueError if no block size divides n_embd
    key, path = weights_file(folder, config, dataset_name, cache)
    if config.quant_mode in CALIBRATED and dataset_name == CNN and not path.exists() and offline():
        dataset_name = str(OFFLINE)  # the key says so: with a network the next run calibrates on CNN / DailyMail
        key, path = weights_file(folder, config, dataset_name, cache)
    if path.exists():
        with safe_open(path, "pt") as file:
            return key, partial(load_file, path), file.metadata()["calibrated_on"]
    model_hf = read_model_hf(folder)
    forward_loop = calibration_loop(model_hf, config.quant_mode, dataset_name)
    calibrated_on = forward_loop.text if forward_loop else ""

    def quantize():
        state = quantized_state(run_modelopt(model_hf, config.quant_mode, forward_loop), config.quant_mode)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda temporary: temporary.write_bytes(save(state, {"calibrated_on": calibrated_on})))
        return state

    return key, quantize, calibrated_on


def weights_file(folder, config, dataset_name, cache):
    key = cache_key(folder, config, dataset_name, cache)
    return key, Path(cache, f"{key}.safetensors")


def cache_key(folder, config, dataset_name, cache):
    """Of all that the quantized weights depend on; they are the same for every config.dtype."""
    data = Path(dataset_name)
    texts = sorted(data.glob("*.txt")) if data.is_dir() else [data] if data.is_file() else []
    vocabularies = [path for name in VOCABULARIES if (path := Path(folder, name)).exists()]  # for calibration
    sizes = config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd
    hashes = known_hashes(hashed_files(folder), cache)
    mode = config.quant_mode, sizes, dataset_name, version("nvidia-modelopt")
    return fingerprint([*vocabularies, *texts], *hashes, *mode)
