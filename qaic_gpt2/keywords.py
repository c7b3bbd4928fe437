"""QEfficient's keywords that a CPU refuses, each with its reason, and the flags of a card's compiler that it records.

With its default a refused keyword has no effect and is accepted. tests/qaic/qefficient/signatures.json lists every
keyword of QEfficient's methods: a test compares.
"""

import difflib

CARDS = "it is for serving with several cards"
EXPERTS = "it is for models with experts"
LARGE = "GPT-2 fits into memory whole"
NAMES = "it names the cache for a server with several cards"
ONE_GRAPH = "this export has one form; compile(onnx_path=...) takes QEfficient's"
SAMPLER = "a CPU samples with sampler=Sampler(...)"

# method -> keyword -> (QEfficient's default, why a CPU refuses another value)
REFUSED = {
    "from_pretrained": {
        "qaic_config": (None, "it configures a card"),
        "max_seq_len_cached": (None, "GPT-2's positions are a table of the checkpoint"),
        "layerwise": (False, LARGE),
        "full_batch_size": (None, "continuous_batching=True replaces it"),
        "enable_proxy": (False, "its stand-ins for layers are for tests of QEfficient"),
        "kv_offload": (None, "it is for models with images"),
        "cache_dir": (None, "the hub's client reads HF_HOME"),
        "low_cpu_mem_usage": (None, "weights are never held twice"),
        "attn_implementation": (None, "the graph has one attention, QEfficient's eager"),
    },
    "export": {
        "prefill_only": (False, CARDS),
        "prefill_seq_len": (None, EXPERTS),
        "num_cores": (16, EXPERTS),
        "moe_prefill_packed_chunk_size": (256, EXPERTS),
        "layerwise": (False, LARGE),
        "layerwise_window_size": (1, LARGE),
        "kv_cache_prefix": (None, NAMES),
        "dynamo": (False, ONE_GRAPH),
        "use_onnx_subfunctions": (False, ONE_GRAPH),
        "offload_pt_weights": (True, "export never keeps weights in torch"),
        "enable_chunking": (False, EXPERTS),
        "retain_full_kv": (False, CARDS),
        "decode_only": (False, ONE_GRAPH),
    },
    "compile": {
        "comp_ctx_lengths_prefill": (None, "a CPU reads the filled slots alone"),
        "comp_ctx_lengths_decode": (None, "a CPU reads the filled slots alone"),
        "kv_cache_batch_size": (None, CARDS),
        "num_speculative_tokens": (None, "generate(draft_tokens=...) drafts from the text itself"),
        "prefill_only": (None, CARDS),
        "use_onnx_subfunctions": (False, ONE_GRAPH),
        "offload_pt_weights": (True, "export never keeps weights in torch"),
        "enable_chunking": (False, EXPERTS),
        "moe_prefill_packed_chunk_size": (256, EXPERTS),
        "retain_full_kv": (None, CARDS),
        "layerwise": (False, LARGE),
        "layerwise_window_size": (1, LARGE),
        "kv_cache_prefix": (None, NAMES),
        "specializations": (None, "the sizes are prefill_seq_len, ctx_len and batch_size"),
        "mdp_num_partitions": (1, CARDS),
        "mdp_strategy": (None, CARDS),
        "mdp_load_partition_config": (None, CARDS),
        "mdp_dump_partition_config": (None, CARDS),
        "mdp_compiler_dump_path": (None, CARDS),
        "enable_qnn": (False, "QNN is another compiler of cards"),
        "qnn_config": (None, "QNN is another compiler of cards"),
        "dynamo": (False, ONE_GRAPH),
        "qaic_config": (None, "it configures a card"),
        "specialization_module_name": (None, "it is for models that draw images"),
    },
    "generate": {
        "write_io": (False, "it saves the buffers of a card"),
        "enable_debug_logs": (False, "it is a log of the card's runtime"),
        "prompt_to_lora_id_mapping": (None, "GPT-2 has no adapters here"),
        "include_sampler": (False, SAMPLER),
        "return_pdfs": (False, SAMPLER),
        "include_guided_decoding": (False, SAMPLER),
        "sampling_params": (None, SAMPLER),
    },
}
# flags of qaic-compile that QEfficient documents: compile passes them on, and a CPU records them
COMPILER_FLAGS = {"mos", "aic_enable_depth_first", "allow_mxint8_mdp_io", "aic_hw_version", "qpc_crc", "io_encrypt"}
COMPILER_FLAGS |= {"allocator_dealloc_delay"}


def check_keywords(method: str, given: dict, served: set[str]) -> None:
    """Refuses, by its name, each keyword in given that has an effect in QEfficient alone, or in neither.

    served: the method's other keywords, for a suggestion.
    """
    refused = REFUSED[method]
    for name, value in given.items():
        if name not in refused:
            near = difflib.get_close_matches(name, [*served, *refused], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"{method} has no keyword {name}{hint}")
        default, reason = refused[name]
        if value is not None and value != default:
            raise ValueError(f"{name} must be {default!r} on a CPU, got {value!r}: {reason}")
