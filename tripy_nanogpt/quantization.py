"""Quantizing a transformers GPT-2 with NVIDIA's ModelOpt.

ModelOpt keeps the weights in float and records the largest absolute values; weight_loader.py turns those into scales.
"""

import json
import queue
import threading
import urllib.error
import urllib.request
import warnings
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from shared.tokenizer import DEADLINE_S, find_model, load_tokenizer
from tripy_nanogpt.files import HERE
from tripy_nanogpt.model import GPTConfig, int4_block

MODES = ("int8-weight-only", "int4-weight-only", "int4-awq", "float8")
# mode -> samples, batch size; AWQ runs each batch a dozen times and rounds all weights each time
CALIBRATED = {"int4-awq": (16, 8), "float8": (64, 4)}
SAMPLE_TOKENS = 256
CNN = "cnn_dailymail"
OFFLINE = HERE / "calibration.txt"  # replaces CNN / DailyMail without a network


@dataclass(frozen=True)
class Quantization:
    mode: str | None = None  # one of MODES, or fp8
    calibration_data: str = CNN  # or a .txt, a .jsonl or a folder
    fast: bool = False  # on the CPU: multiply quantized weights in low precision


NOT_QUANTIZED = Quantization()


def check_mode(quant_mode):
    mode = "float8" if quant_mode == "fp8" else quant_mode
    if mode not in MODES:
        raise ValueError(f"--quant-mode must be {', '.join(MODES)} or fp8, got {quant_mode!r}")
    return mode


def modelopt_quantize(model_hf, quant_mode, dataset_name=CNN):
    """Quantizes model_hf in place, calibrated if the mode needs it; returns it."""
    mode = check_mode(quant_mode)
    return run_modelopt(model_hf, mode, calibration_loop(model_hf, mode, dataset_name))


def calibration_loop(model_hf, mode, dataset_name=CNN):
    """The forward loop that calibrates this mode, or None; a ValueError says what is wrong with the data."""
    if mode not in CALIBRATED:
        return None
    samples, batch = CALIBRATED[mode]
    name = model_hf.config.name_or_path.removeprefix("openai-community/")  # or the folder that it was read from
    tokenizer = load_tokenizer(find_model(name).folder)
    return create_forward_loop(model_hf, dataset_name, tokenizer, model_hf.device, batch, samples)


def run_modelopt(model_hf, mode, forward_loop):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about transformers' version and missing CUDA
        import modelopt.torch.quantization as mtq  # imported here: it takes seconds
    presets = {
        "int8-weight-only": mtq.INT8_WEIGHT_ONLY_CFG,
        "int4-weight-only": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
        "int4-awq": mtq.INT4_AWQ_CFG,
        "float8": mtq.FP8_DEFAULT_CFG,
    }
    settings = deepcopy(presets[mode])
    rules = [*settings["quant_cfg"], {"quantizer_name": "*ln_*", "enable": False}]
    if mode == "float8":  # quantize the head too: it is a third of GPT-2's weights
        rules = [rule for rule in rules if rule["quantizer_name"] != "*lm_head*"]
    if mode.startswith("int4"):
        (weights,) = (rule["cfg"] for rule in rules if rule["quantizer_name"] == "*weight_quantizer")
        weights["block_sizes"][-1] = int4_block(GPTConfig(n_embd=model_hf.config.n_embd, quant_mode=mode))
    settings["quant_cfg"] = rules
    with redirect_stdout(None):  # ModelOpt prints how many quantizers it inserted
        return mtq.quantize(model_hf, settings, forward_loop=forward_loop)


def create_forward_loop(model, dataset_name, tokenizer, device, batch_size, num_samples):
    """A function that runs a model on num_samples texts, on which ModelOpt observes the activations.

    dataset_name: cnn_dailymail, a .txt file, a .jsonl file with a "text" in each line, or a folder of .txt files. The
    function's attribute `text` says what was read: without a network OFFLINE replaces cnn_dailymail.
    """
    texts, source = calibration_texts(dataset_name, num_samples)
    length = min(SAMPLE_TOKENS, model.config.n_positions)
    encoded = [tokenizer.encode(text) for text in texts]
    starts = range(0, max(map(len, encoded), default=0), length)
    samples = [ids[i : i + length] for i in starts for ids in encoded if i < len(ids)][:num_samples]
    if not samples:
        raise ValueError(f"--calibration-data must hold text, got {dataset_name!r}, which is empty")
    pad = (tokenizer.eot if hasattr(tokenizer, "eot") else tokenizer.eos_token_id) or 0  # characters have no eot
    batches = []
    for first in range(0, len(samples), batch_size):
        batch = samples[first : first + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[*sample, *[pad] * (width - len(sample))] for sample in batch], device=device)
        mask = torch.tensor([[1] * len(sample) + [0] * (width - len(sample)) for sample in batch], device=device)
        batches.append({"input_ids": ids, "attention_mask": mask})

    def forward_loop(model):
        with torch.no_grad():
            for batch in tqdm(batches, desc="calibrating", unit="batch", leave=False):
                model(**batch)

    forward_loop.text = f"{len(samples)} samples of up to {length} tokens from {source}"
    return forward_loop


def calibration_texts(dataset_name, count):
    """(texts, what to call them)"""
    if dataset_name == CNN and offline():
        dataset_name = OFFLINE
    path = Path(dataset_name)
    source = f"{OFFLINE.name} ({CNN} is not available)" if path == OFFLINE else str(path)
    try:
        if dataset_name == CNN:
            return articles(count), "CNN / DailyMail"
        if path.is_dir():
            return [file.read_text(encoding="utf-8") for file in sorted(path.glob("*.txt"))], source
        if path.suffix == ".txt":
            return [path.read_text(encoding="utf-8")], source
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            return [json.loads(line)["text"] for line in lines if line.strip()], source
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"--calibration-data {dataset_name!r} cannot be read: {error!r}") from None
    raise ValueError(f"--calibration-data must be {CNN}, a .txt, a .jsonl or a folder, got {dataset_name!r}")


def articles(count):
    """The first articles of CNN / DailyMail from the hub."""
    import datasets  # imported here: it takes seconds

    stream = datasets.load_dataset("abisee/cnn_dailymail", "3.0.0", split="train", streaming=True)
    return [row["article"] for row in stream.take(count)]


def offline():
    """Whether the hub does not answer within seconds."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    answers = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(reachable(constants.ENDPOINT)), daemon=True).start()
    try:
        return not answers.get(timeout=DEADLINE_S)  # urllib's timeout does not cover the look-up of a host name
    except queue.Empty:
        return True


def reachable(url):
    try:
        urllib.request.urlopen(url, timeout=DEADLINE_S).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
