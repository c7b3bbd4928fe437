"""onnxruntime on the graph of fused operators that its GenAI builder makes for other models (it has no GPT-2).

GroupQueryAttention writes into a KV cache that input and output share; SkipLayerNormalization, FastGelu and
MatMulNBits as the builder places them; all of it bound in place (IO binding).
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort

from tests.tools import machine
from tests.tools.peers import gpt2

DTYPES = {"float32": "float32", "int8": "int8", "int4": "int4"}
# bits and block size; with accuracy level 4 the activations are int8 too
QUANTIZED = {"int8": (8, 128), "int4": (4, 32)}
greedy, score = gpt2.greedy, gpt2.score


class Graph:
    """The nodes and weights of one GPT-2."""

    def __init__(self, weights: dict[str, np.ndarray], dtype: str):
        self.weights, self.quantized = weights, QUANTIZED.get(dtype)
        self.nodes, self.constants, self.step_bytes = [], [], 0

    def const(self, name: str, array: np.ndarray, read: bool = True) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        self.step_bytes += array.nbytes if read else 0
        return name

    def node(self, op: str, inputs: list[str], outputs: list[str], domain: str = "com.microsoft", **attributes) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def matmul(self, x: str, name: str, weight: np.ndarray) -> str:  # weight: [K, N]
        if self.quantized is None:
            return self.node("MatMul", [x, self.const(f"{name}.weight", weight)], [f"{name}.product"], domain="")
        (inner, outer), (bits, block) = weight.shape, self.quantized
        while inner % block:  # a width that is no multiple of 128
            block //= 2
        codes, scales = gpt2.quantize(weight.T, bits, block)
        codes = (codes + np.int16(2 ** (bits - 1))).astype(np.uint8)  # MatMulNBits's are unsigned
        codes = gpt2.pack(codes) if bits == 4 else codes
        inputs = [x, self.const(f"{name}.codes", codes), self.const(f"{name}.scales", scales[..., 0])]
        how = {"K": inner, "N": outer, "bits": bits, "block_size": block, "accuracy_level": 4}
        return self.node("MatMulNBits", inputs, [f"{name}.product"], **how)

    def linear(self, x: str, name: str, gelu: bool = False) -> str:
        product = self.matmul(x, name, self.weights[f"{name}.weight"])
        inputs = [product, self.const(f"{name}.bias", self.weights[f"{name}.bias"])]
        return self.node("FastGelu" if gelu else "Add", inputs, [f"{name}.out"], "com.microsoft" if gelu else "")

    def norm(self, x: str, skip: str | None, name: str, epsilon: float) -> tuple[str, str]:
        """The normalized x + skip, and x + skip."""
        scale = [self.const(f"{name}.{part}", self.weights[f"{name}.{part}"]) for part in ("weight", "bias")]
        if skip is None:
            return self.node("LayerNormalization", [x, *scale], [f"{name}.out"], "", epsilon=epsilon), x
        outputs = [f"{name}.out", "", "", f"{name}.sum"]
        return self.node("SkipLayerNormalization", [x, skip, *scale], outputs, epsilon=epsilon), outputs[-1]

    def embed(self) -> str:
        tables = [self.const(name, self.weights[f"{name}.weight"], read=False) for name in ("wte", "wpe")]
        ids = self.node("Gather", [tables[0], "input_ids"], ["tokens"], "")
        return self.node("Add", [ids, self.node("Gather", [tables[1], "position_ids"], ["positions"], "")], ["x"], "")

    def gpt(self, config: gpt2.Config) -> None:
        heads = {"num_heads": config.n_head, "kv_num_heads": config.n_head}
        y, x = self.norm(self.embed(), None, "h.0.ln_1", config.epsilon)
        for i in range(config.n_layer):
            qkv = self.linear(y, f"h.{i}.attn.c_attn")
            inputs = [qkv, "", "", f"past.{i}.k", f"past.{i}.v", "last", "total"]
            outputs = [f"h.{i}.attn.y", f"present.{i}.k", f"present.{i}.v"]
            y = self.linear(self.node("GroupQueryAttention", inputs, outputs, **heads), f"h.{i}.attn.c_proj")
            y, x = self.norm(y, x, f"h.{i}.ln_2", config.epsilon)
            y = self.linear(self.linear(y, f"h.{i}.mlp.c_fc", gelu=True), f"h.{i}.mlp.c_proj")
            after = f"h.{i + 1}.ln_1" if i + 1 < config.n_layer else "ln_f"
            y, x = self.norm(y, x, after, config.epsilon)
        y = self.node("Gather", [y, self.const("-1", np.array([-1]), read=False)], ["y_last"], "", axis=1)
        self.matmul(y, "head", self.weights["wte.weight"].T)


def write(graph: Graph, config: gpt2.Config, folder: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    cache = [1, config.n_head, "slots", config.n_embd // config.n_head]
    names = [f"{i}.{part}" for i in range(config.n_layer) for part in "kv"]
    info = helper.make_tensor_value_info
    inputs = [info(name, TensorProto.INT64, [1, "T"]) for name in ("input_ids", "position_ids")]
    inputs += [info(name, TensorProto.INT32, [1]) for name in ("last", "total")]
    inputs += [info(f"past.{name}", TensorProto.FLOAT, cache) for name in names]
    outputs = [info("head.product", TensorProto.FLOAT, [1, 1, config.vocab_size])]
    outputs += [info(f"present.{name}", TensorProto.FLOAT, cache) for name in names]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "gpt2", inputs, outputs, graph.constants),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    helper.set_model_props(model, {"step_bytes": str(graph.step_bytes)})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.data").unlink(missing_ok=True)  # onnx appends
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.data")


def convert(folder: Path, to: Path) -> None:
    config, weights = gpt2.read_config(folder), gpt2.read_weights(folder)
    gpt2.keep_config(folder, to)
    for dtype in DTYPES:
        graph = Graph(weights, dtype)
        graph.gpt(config)
        write(graph, config, to / dtype)


class Engine:
    def __init__(self, folder: Path, dtype: str):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = machine.cores(), 3
        model = str(folder / dtype / "model.onnx")
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.config, self.dtype = gpt2.read_config(folder), dtype
        self.last, self.total = np.zeros(1, np.int32), np.zeros(1, np.int32)
        self.logits = np.zeros((1, 1, self.config.vocab_size), np.float32)
        self.slots, self.caches, self.bound = 0, {}, {}

    def reset(self, slots: int) -> None:
        self.past = 0
        if slots > self.slots:
            shape = 1, self.config.n_head, slots, self.config.n_embd // self.config.n_head
            names = [f"{i}.{part}" for i in range(self.config.n_layer) for part in "kv"]
            self.slots, self.caches, self.bound = slots, {name: np.zeros(shape, np.float32) for name in names}, {}

    def bind(self, count: int):
        """A binding for count ids, and its arrays of ids and positions."""
        ids, positions = np.zeros((1, count), np.int64), np.zeros((1, count), np.int64)
        inputs = {"input_ids": ids, "position_ids": positions, "last": self.last, "total": self.total}
        inputs |= {f"past.{name}": cache for name, cache in self.caches.items()}
        outputs = {"head.product": self.logits} | {f"present.{name}": cache for name, cache in self.caches.items()}
        binding = self.session.io_binding()
        for bind, arrays in (binding.bind_input, inputs), (binding.bind_output, outputs):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return binding, ids, positions

    def step(self, tokens: list[int]) -> np.ndarray:
        count = len(tokens)
        if count not in self.bound:
            self.bound[count] = self.bind(count)
        binding, ids, positions = self.bound[count]
        ids[:], positions[:] = tokens, np.arange(self.past, self.past + count)
        self.past += count
        self.last[:], self.total[:] = self.past - 1, self.past
        self.session.run_with_iobinding(binding)
        return self.logits[0, 0]


def load(folder: Path, dtype: str) -> Engine:
    return Engine(folder, dtype)


def describe(engine: Engine) -> str:
    kernel = "MatMulNBits, int8 activations" if engine.dtype in QUANTIZED else "MatMul"
    return f"onnxruntime {ort.__version__}, GroupQueryAttention, {kernel}"


def step_bytes(engine: Engine) -> int:
    return int(engine.session.get_modelmeta().custom_metadata_map["step_bytes"])
