"""QEFFAutoModelForCausalLM for a CPU: QEfficient's class by its methods, keywords and defaults, on onnxruntime.

    model = QEFFAutoModelForCausalLM.from_pretrained("gpt2")
    model.compile(num_cores=16)
    model.generate(prompts=["Hi there!!"], tokenizer=tokenizer)

https://quic.github.io/efficient-transformers documents the original. What a CPU cannot do of it is said and recorded,
or refused, and generate has three keywords more: sampler, ignore_eos and return_logits.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import onnx
import torch

from qaic_gpt2 import compiler, exporter, model, quantizer, weight_loader
from qaic_gpt2.files import sha256, written_beside
from qaic_gpt2.generation import Bytes, ExecInfo, PerfMetrics, fix_prompts, generate_batch, print_stats
from qaic_gpt2.runtime import ENGINE, Session
from shared.sampling import Sampler
from shared.tokenizer import find_model


def home():
    """Where artifacts lie without an export_dir or compile_dir: QEfficient's rule, in a folder of our own."""
    if path := os.environ.get("QEFF_HOME"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "qaic_gpt2")


def code(*modules):
    """What of our own an artifact is made by, as its SHA-256: another makes another artifact."""
    return " ".join(sha256(Path(module.__file__)) for module in modules)


class QEFFAutoModelForCausalLM:
    def __init__(self, folder, dtype="float32"):
        self.folder, self.dtype = folder, dtype
        self.config = weight_loader.read_config(folder)
        self.onnx_path = self.qpc_path = self._session = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, continuous_batching=False, qaic_config=None, *, dtype=None, torch_dtype=None
    ):
        """A name that find_model knows, or a folder in Hugging Face's format. dtype: float32 or float16."""
        for name, value in {"continuous_batching": continuous_batching, "qaic_config": qaic_config}.items():
            if value:
                raise ValueError(f"{name} must be None or False on a CPU, got {value!r}")
        dtype = str(dtype or torch_dtype or "float32").removeprefix("torch.")
        if dtype not in weight_loader.DTYPES:
            raise ValueError(f"dtype must be {' or '.join(weight_loader.DTYPES)}, got {dtype!r}")
        name = str(pretrained_model_name_or_path).removeprefix("openai-community/")
        return cls(find_model(name).folder, dtype)

    def __repr__(self):
        with torch.device("meta"):
            return f"{type(self).__name__}\n{weight_loader.GPT(self.config)}"

    def export(self, export_dir=None):
        """The ONNX file's path; its folder is named by what makes the graph and its weights, and made if not there."""
        made_of = f"{weight_loader.digest(self.folder)} {self.dtype} torch {torch.__version__} "
        made_of += code(model, weight_loader, exporter)
        key = hashlib.sha256(made_of.encode())
        folder = Path(export_dir or home(), f"GPT2LMHeadModel-{key.hexdigest()[:16]}")
        if not folder.is_dir():
            gpt = weight_loader.load(self.folder, self.dtype)
            with written_beside(folder) as temporary:
                exporter.export(gpt, temporary)
        self.onnx_path = folder / exporter.GRAPH
        return self.onnx_path

    def compile(
        self,
        onnx_path=None,
        compile_dir=None,
        *,
        prefill_seq_len=None,
        ctx_len=None,
        batch_size=1,
        full_batch_size=None,
        num_devices=1,
        num_cores=16,
        mxfp6_matmul=False,
        mxint8_kv_cache=False,
        int8_matmul=False,
        **compiler_options,
    ):
        """The artifact's path. What only a card has a use for is noted in it; int8_matmul is the CPU's own.

        By default ctx_len is QEfficient's 128, and prefill_seq_len 32, or as many as the model has positions for.
        """
        ctx_len = min(128, self.config.n_positions) if ctx_len is None else ctx_len
        prefill_seq_len = min(32, ctx_len) if prefill_seq_len is None else prefill_seq_len
        sizes = {"batch_size": batch_size, "prefill_seq_len": prefill_seq_len, "ctx_len": ctx_len}
        for name, value in (sizes | {"num_devices": num_devices, "num_cores": num_cores}).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if full_batch_size is not None:
            raise ValueError(f"full_batch_size must be None on a CPU, got {full_batch_size!r}")
        if not prefill_seq_len <= ctx_len <= self.config.n_positions:
            raise ValueError(
                f"ctx_len must be at least prefill_seq_len ({prefill_seq_len}) and at most the model's "
                f"{self.config.n_positions} positions, got {ctx_len}"
            )
        if int8_matmul and self.dtype != "float32":
            raise ValueError(f"dtype must be float32 with int8_matmul, got {self.dtype}")
        onnx_path = Path(onnx_path or self.onnx_path or self.export())
        if not onnx_path.is_file():
            raise ValueError(f"onnx_path must be a file, got {onnx_path}")
        card = {"num_cores": num_cores, "num_devices": num_devices, "mxfp6_matmul": mxfp6_matmul}
        card |= {"mxint8_kv_cache": mxint8_kv_cache} | compiler_options
        record = {"engine": ENGINE, "sizes": sizes, "int8_matmul": int8_matmul, "for_the_card": card}
        record |= {"onnx": self._hashes(onnx_path), "code": code(compiler, quantizer)}
        key = hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()[:16]
        folder = Path(compile_dir or onnx_path.parent, f"qpc-{key}")
        if not folder.is_dir():
            with written_beside(folder) as temporary:
                compiler.compile(onnx_path, temporary, sizes, mxint8_kv_cache, int8_matmul, record)
        self.qpc_path, self._session = folder, None
        idle = ", ".join(f"{name}={value}" for name, value in card.items() if value)
        print(f"compiled for {ENGINE} on this CPU; noted for a card, and without effect here: {idle}")
        return folder

    def _hashes(self, onnx_path):
        """The SHA-256 of a graph's files; a ValueError where those of export are not those that it wrote."""
        folder = onnx_path.parent
        if onnx_path != self.onnx_path:  # the caller's own
            tensors = onnx.load(onnx_path, load_external_data=False).graph.initializer
            names = [onnx_path.name, *sorted({*map(exporter.location, tensors)} - {None})]
            return {name: sha256(folder / name) for name in names}
        try:
            noted = json.loads((folder / exporter.SIDECAR).read_text(encoding="utf-8"))
            found = {name: sha256(folder / name) for name in (exporter.GRAPH, exporter.WEIGHTS)}
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{folder} is no export that can be read ({error}): remove it, to export anew") from None
        if found != noted:
            raise ValueError(f"{folder} is not what was exported (SHA-256): remove it, to export anew")
        return found

    @property
    def session(self):
        """The compiled program, loaded; compiled by the defaults where compile was not called."""
        if self._session is None:
            self._session = Session(self.qpc_path or self.compile())
        return self._session

    def generate(
        self,
        tokenizer,
        prompts,
        device_id=None,
        runtime_ai100=True,
        *,
        generation_len=None,
        stream=True,
        sampler=None,
        ignore_eos=False,
        return_logits=False,
    ):
        """Texts for prompts, batch by batch, greedy without a sampler, to the context's end without a generation_len.

        tokenizer: Hugging Face's, or one of shared.tokenizer. The first row of each batch is printed as it is made, and
        the statistics at the end. runtime_ai100 is QEfficient's word for running at all.
        """
        if generation_len is not None and (type(generation_len) is not int or generation_len < 1):
            raise ValueError(f"generation_len must be a whole number of at least 1, got {generation_len!r}")
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts must be a list of texts, got {prompts!r}")
        if device_id is not None:
            print(f"device_id={device_id} names a card, and is without effect here")
        tokenizer = Bytes(tokenizer) if hasattr(tokenizer, "convert_ids_to_tokens") else tokenizer
        size, prompts = self.session.batch_size, fix_prompts(prompts, self.session.batch_size)
        infos = [
            generate_batch(
                self.session,
                tokenizer,
                prompts[start : start + size],
                generation_len,
                sampler or Sampler(temperature=0),
                ignore_eos,
                stream,
                return_logits,
            )
            for start in range(0, len(prompts), size)
        ]
        metrics = PerfMetrics(*np.mean([[*vars(info.perf_metrics).values()] for info in infos], axis=0).tolist())
        texts, ids = ([getattr(info, name) for info in infos] for name in ("generated_texts", "generated_ids"))
        info = ExecInfo(size, texts, ids, metrics, [rows for info in infos for rows in info.logits])
        print_stats(info)
        return info
