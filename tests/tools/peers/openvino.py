"""OpenVINO's CPU plugin on a stateful model, built from the checkpoint with OpenVINO's own operators.

It is the model that optimum-intel exports and NNCF compresses, without PyTorch: a KV cache in variables, a gather by
beam_idx and scaled_dot_product_attention, which the plugin fuses.
"""

import os
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino.op.util import Variable, VariableInfo

from tests.tools import machine
from tests.tools.peers import gpt2

DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "int4": "int4"}
BLOCK = 64  # of int4; NNCF keeps embeddings and head in int8
greedy, score = gpt2.greedy, gpt2.score


class Graph:
    """Parameters, variables and weights of one GPT-2."""

    def __init__(self, weights: dict[str, np.ndarray], config: gpt2.Config, dtype: str):
        self.weights, self.config, self.dtype = weights, config, dtype
        self.sinks = []
        self.ids, self.mask, self.positions = (
            ops.parameter([-1, -1], np.int64, name) for name in ("input_ids", "attention_mask", "position_ids")
        )
        self.beams = ops.parameter([-1], np.int32, "beam_idx")

    def vector(self, name: str):
        return ops.constant(self.weights[name])

    def matrix(self, weight: np.ndarray, head: bool = False):  # weight: [N, K]
        bits = {"int8": 8, "int4": 8 if head else 4}.get(self.dtype)
        if bits is None:
            return ops.constant(np.ascontiguousarray(weight))
        inner = weight.shape[1]
        codes, scales = gpt2.quantize(weight, bits, inner if bits == 8 else min(BLOCK, inner), np.float16)
        if bits == 8:
            codes, scales = codes[:, 0], scales[:, 0]
        packed = ops.constant(codes)
        if bits == 4:
            tensor = ov.Tensor(gpt2.pack(codes), ov.Shape(codes.shape), ov.Type.i4)
            packed = ops.constant(tensor, shared_memory=False)
        product = ops.multiply(ops.convert(packed, np.float16), ops.constant(scales))
        if bits == 4:
            product = ops.reshape(product, ops.constant(np.array(weight.shape)), False)
        return ops.convert(product, np.float32)

    def linear(self, x, name: str):
        product = ops.matmul(x, self.matrix(self.weights[f"{name}.weight"].T), False, True)
        return ops.add(product, ops.unsqueeze(self.vector(f"{name}.bias"), [0, 1]))

    def norm(self, x, name: str):
        x = ops.mvn(x, ops.constant(np.array([-1])), True, self.config.epsilon, "inside_sqrt")
        return ops.add(ops.multiply(x, self.vector(f"{name}.weight")), self.vector(f"{name}.bias"))

    def cached(self, new, name: str):
        """The cache after new [B, H, T, D] is appended."""
        info = VariableInfo()
        info.data_shape = ov.PartialShape([-1, self.config.n_head, -1, self.config.n_embd // self.config.n_head])
        info.data_type, info.variable_id = ov.Type.f32, name
        variable = Variable(info)
        empty = ops.broadcast(ops.constant(np.float32(0)), self.empty)
        past = ops.gather(ops.read_value(empty, variable), self.beams, ops.constant(np.int64(0)))
        cache = ops.concat([past, new], 2)
        self.sinks.append(ops.assign(cache, variable))
        return cache

    def attend(self, x, i: int):
        size = self.config.n_embd // self.config.n_head
        heads = ops.constant(np.array([0, 0, self.config.n_head, size]))
        q, k, v = (
            ops.transpose(ops.reshape(part, heads, True), ops.constant(np.array([0, 2, 1, 3])))
            for part in ops.split(self.linear(x, f"h.{i}.attn.c_attn"), ops.constant(np.int64(2)), 3).outputs()
        )
        k, v = self.cached(k, f"past.{i}.key"), self.cached(v, f"past.{i}.value")
        y = ops.transpose(ops.scaled_dot_product_attention(q, k, v, self.visible), ops.constant(np.array([0, 2, 1, 3])))
        y = ops.reshape(y, ops.constant(np.array([0, 0, self.config.n_embd])), True)
        return self.linear(y, f"h.{i}.attn.c_proj")

    def prepare(self) -> None:
        """The mask of what each new token sees, and the shape of an empty cache."""
        batch = ops.gather(ops.shape_of(self.ids), ops.constant(np.array([0])), ops.constant(np.int64(0)))
        size = self.config.n_embd // self.config.n_head
        self.empty = ops.concat([batch, *(ops.constant(np.array([n])) for n in (self.config.n_head, 0, size))], 0)
        total = ops.gather(ops.shape_of(self.mask), ops.constant(np.int64(1)), ops.constant(np.int64(0)))
        slots = ops.range(ops.constant(np.int64(0)), total, ops.constant(np.int64(1)), "i64")
        self.visible = ops.less_equal(
            ops.unsqueeze(slots, [0, 1, 2]), ops.unsqueeze(self.positions, [1, 3])
        )  # [B, 1, T, S]

    def model(self) -> ov.Model:
        self.prepare()
        axis = ops.constant(np.int64(0))
        table = self.matrix(self.weights["wte.weight"], head=True)  # also the head
        x = ops.add(
            ops.gather(table, self.ids, axis),
            ops.gather(ops.constant(self.weights["wpe.weight"]), self.positions, axis),
        )
        for i in range(self.config.n_layer):
            x = ops.add(x, self.attend(self.norm(x, f"h.{i}.ln_1"), i))
            y = ops.gelu(self.linear(self.norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), "TANH")
            x = ops.add(x, self.linear(y, f"h.{i}.mlp.c_proj"))
        last = ops.gather(self.norm(x, "ln_f"), ops.constant(np.array([-1])), ops.constant(np.int64(1)))
        logits = ops.result(ops.matmul(last, table, False, True), "logits")
        model = ov.Model([logits], self.sinks, [self.ids, self.mask, self.positions, self.beams], "gpt2")
        for port, name in zip(model.inputs, ("input_ids", "attention_mask", "position_ids", "beam_idx"), strict=True):
            port.tensor.set_names({name})
        model.output(0).tensor.set_names({"logits"})
        return model


def convert(folder: Path, to: Path) -> None:
    config, weights = gpt2.read_config(folder), gpt2.read_weights(folder)
    gpt2.keep_config(folder, to)
    for dtype in "float32", "int8", "int4":
        model = Graph(weights, config, dtype).model()
        ov.save_model(model, to / dtype / "openvino_model.xml", compress_to_fp16=False)


class Engine:
    def __init__(self, folder: Path, dtype: str):
        saved = "float32" if dtype == "bfloat16" else dtype
        precision = "bf16" if dtype == "bfloat16" else "f32"
        settings = {
            "INFERENCE_NUM_THREADS": machine.cores(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "CACHE_DIR": Path(os.environ.get("XDG_CACHE_HOME", folder)) / "openvino" / dtype,
        }
        if dtype == "float32":
            settings["KV_CACHE_PRECISION"] = "f32"  # else 8 bits
        model = ov.Core().compile_model(folder / saved / "openvino_model.xml", "CPU", settings)
        names = "INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION"
        self.precision, self.cache = (model.get_property(name).to_string() for name in names)
        if self.precision != precision:
            raise ValueError(f"{dtype} needs a CPU with bfloat16 instructions")
        self.config, self.dtype = gpt2.read_config(folder), dtype
        self.request = model.create_infer_request()

    def reset(self, slots: int) -> None:
        self.past = 0
        self.request.reset_state()

    def step(self, tokens: list[int]) -> np.ndarray:
        start, self.past = self.past, self.past + len(tokens)
        inputs = {
            "input_ids": np.array([tokens]),
            "attention_mask": np.ones((1, self.past), np.int64),
            "position_ids": np.arange(start, self.past)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.request.infer(inputs, share_inputs=True)
        return self.request.get_output_tensor(0).data[0, -1]


def load(folder: Path, dtype: str) -> Engine:
    return Engine(folder, dtype)


def describe(engine: Engine) -> str:
    weights = f"{engine.dtype} weights, " if engine.dtype.startswith("int") else ""
    return f"OpenVINO {ov.__version__.split('-')[0]}, {weights}{engine.precision}, KV cache in {engine.cache}"


def step_bytes(engine: Engine) -> int:
    """A row's or block's scale is float16; float32 biases and norms."""
    c = engine.config
    if engine.dtype in ("float32", "bfloat16"):
        return (4 if engine.dtype == "float32" else 2) * (c.matrices + c.head) + 4 * c.vectors
    if engine.dtype == "int8":
        return c.matrices + c.head + 2 * c.rows + 4 * c.vectors
    return c.matrices // 2 + 2 * c.matrices // BLOCK + c.head + 2 * c.vocab_size + 4 * c.vectors
