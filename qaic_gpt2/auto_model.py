"""QEFFAutoModelForCausalLM for a CPU: QEfficient's class with its methods, keywords and defaults, on onnxruntime.

    model = QEFFAutoModelForCausalLM.from_pretrained("gpt2")
    model.compile(num_cores=16)
    model.generate(prompts=["Hi there!!"], tokenizer=tokenizer)

https://quic.github.io/efficient-transformers documents the original. A setting that only a card can use is recorded in
the artifact and printed, or refused (keywords.py). generate has four more keywords: sampler, ignore_eos, return_logits
and draft_tokens; compile has two: int8_matmul and int4_matmul.
"""

import hashlib
import inspect
import json
from pathlib import Path

from qaic_gpt2 import generation, quantizer, weight_loader
from qaic_gpt2.drafting import Drafting
from qaic_gpt2.files import (
    EXPORT_FORMAT,
    EXPORT_SIDECAR,
    FORMAT,
    GRAPH,
    QPC,
    WEIGHTS,
    ArtifactError,
    home,
    prune,
    sha256,
    touch,
    write_folder,
)
from qaic_gpt2.keywords import COMPILER_FLAGS, check_keywords
from qaic_gpt2.runtime import ENGINE, Session
from shared.tokenizer import find_model


def short_hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_sizes(
    config: weight_loader.GPTConfig,
    batch_size: int,
    prefill_seq_len: int,
    ctx_len: int,
    full_batch_size: int | None = None,
) -> None:
    sizes = {"batch_size": batch_size, "prefill_seq_len": prefill_seq_len, "ctx_len": ctx_len}
    if full_batch_size is not None:
        sizes["full_batch_size"] = full_batch_size
    for name, value in sizes.items():
        check_whole(name, value)
    if not prefill_seq_len <= ctx_len <= config.block_size:
        raise ValueError(
            f"ctx_len must be from prefill_seq_len ({prefill_seq_len}) to the model's {config.block_size} positions, "
            f"got {ctx_len}"
        )


def check_whole(name: str, value, least: int = 1) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number of {least} or more, got {value!r}")


def served(method) -> set[str]:
    return {*inspect.signature(method).parameters} - {"self", "others"}


class QEFFAutoModelForCausalLM:
    def __init__(self, folder, dtype="float32", continuous_batching=False):
        self.folder, self.dtype, self.continuous_batching = folder, dtype, continuous_batching
        self.config = weight_loader.read_config(folder)
        self.onnx_path = self.qpc_path = self._session = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, continuous_batching=False, *, dtype=None, torch_dtype=None, **others
    ):
        """A name that find_model knows, or a folder in Hugging Face's format. dtype: float32 or float16."""
        check_keywords("from_pretrained", others, served(cls.from_pretrained))
        dtype = str(dtype or torch_dtype or "float32").removeprefix("torch.")
        if dtype not in weight_loader.DTYPES:
            raise ValueError(f"dtype must be {' or '.join(weight_loader.DTYPES)}, got {dtype!r}")
        name = str(pretrained_model_name_or_path).removeprefix("openai-community/")
        return cls(find_model(name).folder, dtype, continuous_batching)

    def __repr__(self):
        import torch

        from qaic_gpt2 import model

        with torch.device("meta"):
            return f"{type(self).__name__}\n{model.GPT(self.config)}"

    def export(self, export_dir=None, **others):
        """The path of the ONNX file. Its folder is named by the weights, the dtype and the format, and written once."""
        check_keywords("export", others, served(self.export))
        try:
            key = short_hash(f"{weight_loader.digest(self.folder)} {self.dtype} {EXPORT_FORMAT}")
            folder = Path(export_dir or home(), f"GPT2LMHeadModel-{key}")
            gpt = None if folder.is_dir() else weight_loader.load(self.folder, self.dtype)
        except ValueError as error:
            raise ArtifactError(error) from None
        if gpt:
            from qaic_gpt2 import exporter

            with write_folder(folder) as temporary:
                exporter.export(gpt, temporary)
            if not export_dir:
                prune(home(), "GPT2LMHeadModel-*")
        touch(folder)
        self.onnx_path = folder / GRAPH
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
        int4_matmul=False,
        **others,
    ):
        """The path of what runs, in the artifact's folder. Settings for a card are recorded there.

        int8_matmul and int4_matmul are for a CPU. By default both lengths are 128, or less for a model with fewer
        positions: on a CPU, QEfficient's 32 for prefill_seq_len is slower. With continuous_batching, full_batch_size
        texts are generated at a time.
        """
        flags = {name: others.pop(name) for name in [*others] if name in COMPILER_FLAGS}
        check_keywords("compile", others, served(self.compile) | COMPILER_FLAGS)
        ctx_len = min(128, self.config.block_size) if ctx_len is None else ctx_len
        prefill_seq_len = min(128, ctx_len) if prefill_seq_len is None else prefill_seq_len
        sizes = {"batch_size": batch_size, "prefill_seq_len": prefill_seq_len, "ctx_len": ctx_len}
        sizes |= {"full_batch_size": full_batch_size} if self.continuous_batching else {}
        check_sizes(self.config, **sizes)
        self._check_batching(full_batch_size)
        card = {"num_cores": num_cores, "num_devices": num_devices}
        for name, value in card.items():
            check_whole(name, value)
        bits = self._bits(int8_matmul, int4_matmul)
        card |= {"mxfp6_matmul": mxfp6_matmul, "mxint8_kv_cache": mxint8_kv_cache} | flags
        record = {"engine": ENGINE, "sizes": sizes, "bits": bits, "for_the_card": card}
        self.qpc_path = self._compile(Path(onnx_path or self.onnx_path or self.export()), compile_dir, record)
        self._session = None
        unused = ", ".join(f"{name}={value}" for name, value in card.items() if value)
        print(f"compiled for {ENGINE} on this CPU; recorded for a card, and without effect here: {unused}")
        return self.qpc_path

    def _check_batching(self, full_batch_size: int | None) -> None:
        if self.continuous_batching and full_batch_size is None:
            raise ValueError("full_batch_size must be 1 or more with continuous_batching=True, got None")
        if not self.continuous_batching and full_batch_size is not None:
            raise ValueError(f"full_batch_size must be None without continuous_batching=True, got {full_batch_size!r}")

    def _bits(self, int8_matmul: bool, int4_matmul: bool) -> int | None:
        if int8_matmul and int4_matmul:
            raise ValueError("int4_matmul must be False with int8_matmul, got True")
        bits = 8 if int8_matmul else 4 if int4_matmul else None
        if bits and self.dtype != "float32":
            raise ValueError(f"dtype must be float32 with int{bits}_matmul, got {self.dtype}")
        if bits:
            quantizer.check_blocks(self.config, bits)
        return bits

    def _compile(self, onnx_path: Path, compile_dir: Path | None, record: dict) -> Path:
        """QPC in the artifact's folder, which is named by what it is compiled from, and written once."""
        if not onnx_path.is_file():
            raise ValueError(f"onnx_path must be a file, got {onnx_path}")
        record |= {"onnx": self._hashes(onnx_path), "format": FORMAT}
        key = short_hash(json.dumps(record, sort_keys=True, default=str))
        folder = Path(compile_dir or onnx_path.parent, f"{QPC}-{key}")
        if not folder.is_dir():
            from qaic_gpt2 import compiler

            with write_folder(folder) as temporary:
                compiler.compile(onnx_path, temporary, record, self.config)
            if not compile_dir:
                prune(onnx_path.parent, f"{QPC}-*")
        touch(folder)
        return folder / QPC

    def _hashes(self, onnx_path):
        """The SHA-256 of a graph's files; an ArtifactError if export wrote them and they have changed."""
        folder = onnx_path.parent
        if onnx_path != self.onnx_path:  # the caller's own
            from qaic_gpt2 import exporter

            names = [onnx_path.name, *exporter.locations(onnx_path)]
            return {name: sha256(folder / name) for name in names}
        try:
            expected = dict(json.loads((folder / EXPORT_SIDECAR).read_text(encoding="utf-8")))
            hashes = {name: sha256(folder / name) for name in (GRAPH, WEIGHTS)}
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ArtifactError(f"{folder / EXPORT_SIDECAR}: {error}: remove the folder to export again") from None
        if wrong := [name for name in hashes if hashes[name] != expected.get(name)]:
            path, sidecar = folder / wrong[0], EXPORT_SIDECAR
            raise ArtifactError(f"{path}: SHA-256 does not match {sidecar}: remove the folder to export again")
        return hashes

    @property
    def session(self):
        """The compiled program, loaded; if compile was not called, it is called with its defaults."""
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
        prompts_txt_file_path=None,
        generation_len=None,
        stream=True,
        iteration=1,
        automation=False,
        sampler=None,
        ignore_eos=False,
        return_logits=False,
        draft_tokens=0,
        **others,
    ):
        """The texts after prompts; by default greedy, and to the end of the context.

        tokenizer: Hugging Face's, or one of shared.tokenizer. prompts: a text, or a list of texts; or the lines of a
        file. The first text of each batch is printed token by token, and the statistics at the end. runtime_ai100 is
        ignored: QEfficient needs it to run on a card at all. draft_tokens: see drafting.py.
        """
        check_keywords("generate", others, served(self.generate))
        if generation_len is not None:
            check_whole("generation_len", generation_len)
        check_whole("iteration", iteration)
        prompts = generation.read_prompts(prompts, prompts_txt_file_path)
        if device_id is not None:
            print(f"device_id={device_id} names a card, and is without effect here")
        if hasattr(tokenizer, "convert_ids_to_tokens"):
            tokenizer = generation.HuggingFaceBytes(tokenizer)
        options = generation.Options(generation_len, sampler, ignore_eos, stream, return_logits)
        session = self._drafting(draft_tokens)
        for _ in range(iteration):
            info = generation.generate(session, tokenizer, prompts, options)
            generation.print_stats(info, prompts, automation)
        return info

    def _drafting(self, draft_tokens: int) -> Session | Drafting:
        """The session, which with draft_tokens decodes several tokens a call."""
        check_whole("draft_tokens", draft_tokens, 0)
        if not draft_tokens:
            return self.session
        if not self.session.drafts:
            raise ValueError(f"draft_tokens must be 0 but for single texts in float32, got {draft_tokens}")
        return Drafting(self.session, draft_tokens)
