"""Quantizing a Hugging Face GPT-2 with NVIDIA's ModelOpt.

ModelOpt leaves the weights in float, and notes how large they are; weight_loader.py makes scales of that.
"""

import json
import queue
import threading
import urllib.request
import warnings
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path

import torch
from tqdm import tqdm

from shared.tokenizer import DEADLINE_S, load_tokenizer
from tripy_nanogpt.model import GPTConfig, int4_block

MODES = ("int8-weight-only", "int4-weight-only", "int4-awq", "float8")
# mode -> samples, batch size; AWQ runs each batch a dozen times, and rounds all weights for it each time
CALIBRATED = {"int4-awq": (16, 8), "float8": (64, 4)}
SAMPLE_TOKENS = 256
CNN = "cnn_dailymail"
ROOT = Path(__file__).resolve().parents[1]
# what stands in for CNN / DailyMail without a network: no text that gpt2-nano's perplexity is measured on
REPOSITORY = ("LICENSE", "checkpoints/gpt2-nano/README.md")


def check_mode(quant_mode):
    mode = "float8" if quant_mode == "fp8" else quant_mode
    if mode not in MODES:
        raise ValueError(f"quant mode is {quant_mode}, one of {', '.join(MODES)}, fp8 is expected")
    return mode


def modelopt_quantize(model_hf, quant_mode, dataset_name=CNN, tokenizer=None):
    """Quantizes model_hf in place, and calibrates it where the mode asks for that; returns it.

    Without a tokenizer it takes the one beside the model's checkpoint.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at versions of transformers, at missing CUDA
        import modelopt.torch.quantization as mtq
    mode = check_mode(quant_mode)
    presets = {
        "int8-weight-only": mtq.INT8_WEIGHT_ONLY_CFG,
        "int4-weight-only": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
        "int4-awq": mtq.INT4_AWQ_CFG,
        "float8": mtq.FP8_DEFAULT_CFG,
    }
    settings = deepcopy(presets[mode])
    rules = [*settings["quant_cfg"], {"quantizer_name": "*ln_*", "enable": False}]
    if mode == "float8":  # the head too: it is a third of GPT-2's weights
        rules = [rule for rule in rules if rule["quantizer_name"] != "*lm_head*"]
    if mode.startswith("int4"):
        block = int4_block(GPTConfig(n_embd=model_hf.config.n_embd, quant_mode=mode))
        (weights,) = (rule["cfg"] for rule in rules if rule["quantizer_name"] == "*weight_quantizer")
        weights["block_sizes"][-1] = block
    settings["quant_cfg"] = rules
    forward_loop = None
    model_hf.calibrated_on = ""
    if mode in CALIBRATED:
        samples, batch = CALIBRATED[mode]
        tokenizer = tokenizer or load_tokenizer(model_hf.config.name_or_path)
        forward_loop = create_forward_loop(model_hf, dataset_name, tokenizer, model_hf.device, batch, samples)
        model_hf.calibrated_on = forward_loop.text
    with redirect_stdout(None):  # ModelOpt tells how many layers it met
        return mtq.quantize(model_hf, settings, forward_loop=forward_loop)


def create_forward_loop(model, dataset_name, tokenizer, device, batch_size, num_samples):
    """A function that runs a model on num_samples texts, from which ModelOpt sees how large activations become.

    dataset_name: cnn_dailymail, a .txt file, a .jsonl file with a "text" in each line, or a folder of .txt files. The
    function's attribute `text` says what was taken: without a network cnn_dailymail becomes the repository's own text.
    """
    texts, said = calibration_texts(dataset_name, num_samples)
    length = min(SAMPLE_TOKENS, model.config.n_positions)
    encoded = [tokenizer.encode(text) for text in texts]
    starts = range(0, max(map(len, encoded), default=0), length)
    samples = [ids[i : i + length] for i in starts for ids in encoded if i < len(ids)][:num_samples]
    if not samples:
        raise ValueError(f"calibration data is {dataset_name}, which holds no text")
    end = (tokenizer.eot if hasattr(tokenizer, "eot") else tokenizer.eos_token_id) or 0  # characters have none
    batches = []
    for first in range(0, len(samples), batch_size):
        batch = samples[first : first + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[*sample, *[end] * (width - len(sample))] for sample in batch], device=device)
        mask = torch.tensor([[1] * len(sample) + [0] * (width - len(sample)) for sample in batch], device=device)
        batches.append({"input_ids": ids, "attention_mask": mask})

    def forward_loop(model):
        with torch.no_grad():
            for batch in tqdm(batches, desc="calibrating", unit="batch", leave=False):
                model(**batch)

    forward_loop.text = f"{len(samples)} samples of up to {length} tokens from {said}"
    return forward_loop


def calibration_texts(dataset_name, count):
    """(texts, what to call them)"""
    path = Path(dataset_name)
    if dataset_name == CNN:
        try:
            return articles(count), "CNN / DailyMail"
        except OSError as error:
            why = f"{CNN} cannot be had: {' '.join(str(error).split())}"
        texts = [(ROOT / name).read_text(encoding="utf-8") for name in REPOSITORY]
        return texts, f"{' and '.join(REPOSITORY)} ({why})"
    try:
        if path.is_dir():
            return [file.read_text(encoding="utf-8") for file in sorted(path.glob("*.txt"))], str(path)
        if path.suffix == ".txt":
            return [path.read_text(encoding="utf-8")], str(path)
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            return [json.loads(line)["text"] for line in lines if line.strip()], str(path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"calibration data is {dataset_name}, which cannot be read: {error!r}") from None
    raise ValueError(f"calibration data is {dataset_name}; {CNN}, a .txt, a .jsonl or a folder is expected")


def articles(count):
    """The first articles of CNN / DailyMail, from the hub; OSError without a network, in a few seconds."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    answers = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(_answer_of(constants.ENDPOINT)), daemon=True).start()
    try:
        answer = answers.get(timeout=DEADLINE_S)  # looking up a host's name takes no time-out of its own
    except queue.Empty:
        answer = f"no answer within {DEADLINE_S:g} s"
    if answer:
        raise OSError(answer)
    import datasets

    stream = datasets.load_dataset("abisee/cnn_dailymail", "3.0.0", split="train", streaming=True)
    return [row["article"] for row in stream.take(count)]


def _answer_of(url):
    """What is wrong with the host, or nothing."""
    try:
        urllib.request.urlopen(url, timeout=DEADLINE_S).close()
    except OSError as error:
        return str(getattr(error, "reason", error))
    return ""
