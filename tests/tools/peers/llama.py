"""llama.cpp by the C functions that llama-cpp-python binds; Llama, its class, would add Python work to each token."""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np

from tests.tools import machine
from tests.tools.peers import gpt2

DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16", "int8": "int8", "int4": "int4"}
# what llama.cpp's own tool, llama-quantize, makes from the float32 file
TYPES = {
    "bfloat16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "float16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "int8": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "int4": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}
NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
greedy, score = gpt2.greedy, gpt2.score
silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))


def gguf_name(name: str) -> str:
    """h.0.attn.c_attn.weight -> blk.0.attn_qkv.weight"""
    part, leaf = name.rsplit(".", 1)
    if not part.startswith("h."):
        return f"{NAMES[part]}.{leaf}"
    _, layer, part = part.split(".", 2)
    return f"blk.{layer}.{NAMES[part]}.{leaf}"


def write(weights: dict[str, np.ndarray], config: gpt2.Config, path: Path) -> None:
    """The float32 GGUF file, without a vocabulary."""
    import gguf

    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, array in weights.items():
        is_matrix = name.startswith("h.") and array.ndim == 2
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(array.T if is_matrix else array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(folder: Path, to: Path) -> None:
    gpt2.keep_config(folder, to)
    source = to / "float32.gguf"
    write(gpt2.read_weights(folder), gpt2.read_config(folder), source)
    for dtype, kind in TYPES.items():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = kind, machine.cores()
        if llama_cpp.llama_model_quantize(bytes(source), bytes(to / f"{dtype}.gguf"), params):
            raise RuntimeError(f"llama.cpp cannot quantize {source} to {dtype}")


class Engine:
    def __init__(self, folder: Path, dtype: str):
        self.config = gpt2.read_config(folder)
        path = folder / f"{dtype}.gguf"
        self.model = llama_cpp.llama_model_load_from_file(bytes(path), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = self.config.block_size
        params.n_threads = params.n_threads_batch = machine.cores()
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.memory = llama_cpp.llama_get_memory(self.context)

    def reset(self, slots: int) -> None:
        llama_cpp.llama_memory_clear(self.memory, False)

    def step(self, tokens: list[int]) -> np.ndarray:
        array = (ctypes.c_int32 * len(tokens))(*tokens)  # the batch points to it
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, (self.config.vocab_size,))


def load(folder: Path, dtype: str) -> Engine:
    return Engine(folder, dtype)


def describe(engine: Engine) -> str:
    text = ctypes.create_string_buffer(256)
    llama_cpp.llama_model_desc(engine.model, text, len(text))
    return f"llama.cpp (llama-cpp-python {llama_cpp.__version__}), {text.value.decode()}"


def step_bytes(engine: Engine) -> int:
    """The file's weights but the position embeddings, which stay in float32; the head is the token embeddings."""
    return llama_cpp.llama_model_size(engine.model) - 4 * engine.config.block_size * engine.config.n_embd
