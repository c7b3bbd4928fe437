"""tripy_cpu against torch, nvtripy's own classes and what nvtripy documents. Nothing here knows how a program runs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tripy_nanogpt import tripy_cpu

# isort: split
import nvtripy as tp  # once tripy_cpu has made its place

from tripy_nanogpt.device import choose_device

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(tripy_cpu.ENGINE is None, reason="TensorRT is here: this is for machines without it"),
]
GPU, CPU = tp.device("gpu"), tp.device("cpu")


def put(tensor):
    return tp.copy(tp.Tensor(tensor.contiguous()), GPU)


def get(tensor):
    return torch.from_dlpack(tensor).clone()


def info(*shape, dtype=tp.float32):
    return tp.InputInfo(shape, dtype=dtype)


def run(function, *tensors):
    """function compiled for these tensors' types and shapes, and run on them."""
    infos = [tp.InputInfo(tuple(t.shape), dtype=getattr(tp, str(t.dtype).removeprefix("torch."))) for t in tensors]
    return get(tp.compile(function, args=infos)(*map(put, tensors)))


def python(code, *path):
    lines = f"import sys; sys.path[:0] = {[*map(str, path), str(ROOT)]}\n{code}"
    return subprocess.run([sys.executable, "-c", lines], capture_output=True, encoding="utf-8")


# -- where it switches on


def test_engine_names_versions():
    assert (
        f"nvtripy {tp.__version__}'s front end, executed by torch {torch.__version__.split('+')[0]}" == tripy_cpu.ENGINE
    )


def test_real_installation_is_not_shadowed(tmp_path):
    (tmp_path / "mlir_tensorrt").mkdir()
    (tmp_path / "mlir_tensorrt" / "__init__.py").touch()
    code = "print(tripy_cpu.ENGINE, 'tensorrt' in sys.modules, 'torch' in sys.modules)"
    done = python(f"from tripy_nanogpt import tripy_cpu\n{code}", tmp_path)
    assert done.stdout.split() == ["None", "False", "False"], done.stderr


def test_other_version_is_refused(tmp_path):
    folder = tmp_path / "nvtripy-0.1.6.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: nvtripy\nVersion: 0.1.6\n", encoding="utf-8")
    done = python("from tripy_nanogpt import tripy_cpu", tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: nvtripy 0.1.6 does not run on the CPU: pip install --no-deps nvtripy==0.1.7"
    )


def test_stack_information_is_nvtripys():
    from nvtripy.utils import stack_info

    spec = importlib.util.spec_from_file_location("untouched", stack_info.__file__)
    untouched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(untouched)
    ours, expected = stack_info.get_stack_info(1), untouched.get_stack_info(1)
    assert [vars(i) for i in ours[1:]] == [vars(i) for i in expected[1:]]
    assert (ours[0].function, ours[0].line) == (expected[0].function, expected[0].line)


# -- values


def test_outputs_do_not_alias_constants_inputs_or_each_other():
    constant, x = torch.ones(2, 3), torch.arange(6.0).reshape(2, 3)
    kept = tp.Tensor(constant)
    function = tp.compile(lambda x: [kept + 0.0, x, tp.reshape(x, (3, 2)), tp.permute(x, (1, 0))], args=[info(2, 3)])
    given = put(x)
    for _ in range(2):
        outputs = [torch.from_dlpack(out) for out in function(given)]
        for out, expected in zip(outputs, (constant, x, x.reshape(3, 2), x.t()), strict=True):
            assert torch.equal(out, expected)
            out.fill_(7)
        assert torch.equal(get(given), x)


def test_constants_are_baked_in():
    weight = torch.randn(200, 200)
    vector = torch.randn(200)
    kept = tp.Tensor(weight), tp.Tensor(vector)
    function = tp.compile(lambda x: x @ kept[0] + kept[1], args=[info(1, 200)])
    x, expected = torch.randn(1, 200), None
    expected = x @ weight + vector
    weight.zero_(), vector.zero_()
    assert torch.allclose(get(function(put(x))), expected, atol=1e-4)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_with_weights(dtype, rows, transposed):
    torch.manual_seed(0)
    weight = torch.randn(192, 160).to(dtype) * 0.1
    bias = torch.randn(192).to(dtype)
    x = torch.randn(1, rows, 160).to(dtype)
    given = tp.Tensor(weight if transposed else weight.t().contiguous())
    added = tp.Tensor(bias)

    def linear(x):
        return x @ (tp.transpose(given, 1, 0) if transposed else given) + tp.unsqueeze(added, 0)

    product = (x.double() @ weight.double().t()).to(dtype)
    expected = (product.double() + bias.double()).to(dtype)
    agree(run(linear, x), expected)


@pytest.mark.parametrize("left, right", [((160,), (160, 192)), ((5, 3, 160), (160, 192)), ((2, 5, 160), (1, 160, 192))])
def test_products_of_other_ranks(left, right):
    torch.manual_seed(0)
    x, weight = torch.randn(left), torch.randn(right)
    kept = tp.Tensor(weight)
    assert torch.allclose(run(lambda x: x @ kept, x), x @ weight, atol=1e-4)


def ordered(x):
    """Halves as integers, one apart where they are one ulp apart."""
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, -32768 - bits, bits)


def agree(ours, expected):
    """Half precision: rounded once an operation, so 99 % are equal and the rest within 2 ulp."""
    if ours.dtype is torch.float32:
        assert torch.allclose(ours, expected, atol=1e-5, rtol=1e-5)
    else:
        apart = (ordered(ours) - ordered(expected)).abs()
        near_zero = (ours.float() - expected.float()).abs() < 1e-3  # sums that cancel: an ulp of what was added
        assert ((apart == 0).float().mean() >= 0.99) and ((apart <= 2) | near_zero).all()


POINTWISE = {
    "exp": torch.exp, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu, "gelu": F.gelu,
    "sin": torch.sin, "cos": torch.cos,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", POINTWISE)
def test_half_precision_is_float32_rounded_once(name, dtype):
    x = torch.linspace(-4, 4, 1001).to(dtype)
    agree(run(getattr(tp, name), x), POINTWISE[name](x.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_reductions_accumulate_in_float32(dtype):
    torch.manual_seed(0)
    x, y = torch.rand(64, 2048).to(dtype), torch.rand(2048, 64).to(dtype)
    agree(run(lambda x: tp.sum(x, dim=1), x), x.float().sum(1).to(dtype))
    agree(run(lambda x: tp.softmax(x, dim=-1), x), x.double().softmax(-1).to(dtype))
    agree(run(lambda x, y: x @ y, x, y), (x.double() @ y.double()).to(dtype))


def test_dynamic_shapes_at_the_edges():
    function = tp.compile(
        lambda x: tp.softmax(tp.reshape(x, (-1,)), dim=0) * tp.cast(x.shape[0], tp.float32), args=[info((1, 3, 6))]
    )
    for n in (1, 3, 6, 2, 1):
        x = torch.randn(n)
        assert torch.allclose(get(function(put(x))), x.softmax(0) * n, atol=1e-6)
    for n in (0, 7):
        with pytest.raises(tp.TripyException, match="Unexpected tensor shape"):
            function(put(torch.randn(n)))


def test_more_shapes_than_plans_are_kept():
    function = tp.compile(lambda x: x + tp.iota((x.shape[0],)), args=[info((1, 8, 40))])
    for n in [*range(1, 41), 1, 40]:
        assert torch.equal(get(function(put(torch.ones(n)))), torch.ones(n) + torch.arange(n))


def test_sizes_as_inputs():
    function = tp.compile(lambda x, n: tp.reshape(x, (-1, n)), args=[info(12), tp.DimensionInputInfo((2, 3, 6))])
    for n in (2, 3, 6, 3):
        assert torch.equal(
            get(function(put(torch.arange(12.0)), tp.DimensionSize(n))), torch.arange(12.0).reshape(-1, n)
        )


def test_wrong_type_rank_and_device_raise_nvtripys_errors():
    function = tp.compile(lambda x: x + 1.0, args=[info(2, 2)])
    with pytest.raises(tp.TripyException, match="Unexpected tensor data type"):
        function(put(torch.ones(2, 2, dtype=torch.int32)))
    with pytest.raises(tp.TripyException, match="Unexpected tensor rank"):
        function(put(torch.ones(2)))
    with pytest.raises(tp.TripyException, match="Unexpected tensor device"):
        function(tp.Tensor(torch.ones(2, 2)))


def test_torchs_error_names_the_users_line():
    with pytest.raises(tp.TripyException) as caught:
        (tp.ones((2, 3)) @ tp.ones((4, 5))).eval()  # here
    assert "MatrixMultiply" in str(caught.value) and "# here" in str(caught.value)
    assert "tripy_cpu/" not in str(caught.value)


def test_unsupported_operation_is_named():
    def plugin(x):
        return tp.plugin(name="CustomGeluPluginDynamic", inputs=[x], output_info=[(1, tp.float32)], type_id=0)

    with pytest.raises(tp.TripyException, match="Plugin: the CPU has no kernel for this operation"):
        tp.compile(plugin, args=[info(2)])


def test_float8_does_not_leave_through_dlpack():
    x = tp.quantize(tp.Tensor([1.0, 2.0]), 1.0, tp.float8).eval()
    with pytest.raises(Exception, match="Unsupported kFloat bits 8"):
        torch.from_dlpack(x)
    assert get(tp.dequantize(x, 1.0, tp.float32)).tolist() == [1.0, 2.0]


def test_outputs_along_the_way_to_another_stay_what_they_are():
    weight, bias = tp.Tensor(torch.eye(160)), tp.Tensor(torch.ones(160))

    def function(x):
        product = x @ weight
        return [product, tp.reshape(product, (1, 160)), product + bias, tp.reshape(product, (160,)) + bias]

    x = torch.randn(1, 160)
    outputs = tp.compile(function, args=[info(1, 160)])(put(x))
    for out, expected in zip(outputs, (x, x, x + 1, x[0] + 1), strict=True):
        assert torch.allclose(get(out), expected, atol=1e-5)


def test_index_that_is_not_there_raises_nvtripys_error():
    function = tp.compile(lambda x, i: tp.gather(x, 0, i), args=[info(3, 2), info(1, dtype=tp.int32)])
    with pytest.raises(tp.TripyException, match="index 3"):
        function(put(torch.ones(3, 2)), at(3))


# -- caches: where(slots == position, new, old) is a write in place that nobody can see

S = 16


def update(new, old, position):
    here = tp.reshape(tp.arange(S, dtype=tp.int32), (1, S, 1)) == tp.reshape(position, (1, 1, 1))
    cache = tp.where(here, new, old)
    return [cache, tp.sum(cache)]


@pytest.fixture(scope="module")
def cache_update():
    return tp.compile(update, args=[info(2, 1, 3), info(2, S, 3), info(1, dtype=tp.int32)])


def at(position):
    return put(torch.tensor([position], dtype=torch.int32))


def test_cache_is_written_in_place(cache_update):
    cache, _ = cache_update(put(torch.ones(2, 1, 3)), put(torch.zeros(2, S, 3)), at(0))
    where = cache.trace_tensor.producer.data.data.data_ptr()
    cache, _ = cache_update(put(torch.ones(2, 1, 3)), cache, at(1))
    assert cache.trace_tensor.producer.data.data.data_ptr() == where


@pytest.mark.parametrize("order", [range(9), range(8, -1, -1), (3, 0, 5, 8, 1, 2, 4, 6, 7)], ids=str)
def test_older_caches_keep_their_values(cache_update, order):
    """In whatever order they are read again; position 1 is written twice."""
    torch.manual_seed(0)
    expected, held = [torch.zeros(2, S, 3)], [put(torch.zeros(2, S, 3))]
    for position in [0, 1, 2, 1, 15, 3, -1, 16]:
        new, value = torch.randn(2, 1, 3), expected[-1].clone()
        if 0 <= position < S:
            value[:, position] = new[:, 0]
        cache, total = cache_update(put(new), held[-1], at(position))
        assert torch.allclose(get(total), value.sum(), atol=1e-5)
        held.append(cache)
        expected.append(value)
    for i in order:
        assert torch.equal(get(held[i]), expected[i])


def test_two_futures_of_one_cache(cache_update):
    start = put(torch.zeros(2, S, 3))
    past, _ = cache_update(put(torch.full((2, 1, 3), 1.0)), start, at(0))
    left, _ = cache_update(put(torch.full((2, 1, 3), 2.0)), past, at(1))
    right, _ = cache_update(put(torch.full((2, 1, 3), 3.0)), past, at(1))
    assert [get(c)[0, :3, 0].tolist() for c in (start, past, left, right)] == [
        [0, 0, 0], [1, 0, 0], [1, 2, 0], [1, 3, 0],
    ]  # fmt: skip


def test_view_outside_nvtripy_is_not_written(cache_update):
    cache, _ = cache_update(put(torch.ones(2, 1, 3)), put(torch.zeros(2, S, 3)), at(0))
    view = torch.from_dlpack(cache)
    before = view.clone()
    newer, _ = cache_update(put(torch.full((2, 1, 3), 5.0)), cache, at(0))
    assert torch.equal(view, before) and get(newer)[0, 0, 0] == 5
    view.fill_(9)
    assert get(newer)[0, 1, 0] == 0


def test_one_cache_given_twice():
    def both(new, a, b, position):
        return update(new, a, position)[0], update(new * 2.0, b, position)[0]

    function = tp.compile(both, args=[info(2, 1, 3), info(2, S, 3), info(2, S, 3), info(1, dtype=tp.int32)])
    same = put(torch.zeros(2, S, 3))
    a, b = function(put(torch.ones(2, 1, 3)), same, same, at(4))
    assert (get(a)[:, 4] == 1).all() and (get(b)[:, 4] == 2).all() and (get(same) == 0).all()


def test_cache_that_is_read_after_the_update_is_not_written():
    def compare(new, old, position):
        return [update(new, old, position)[0], old * 2.0]

    function = tp.compile(compare, args=[info(2, 1, 3), info(2, S, 3), info(1, dtype=tp.int32)])
    start = torch.randn(2, S, 3)
    cache, doubled = function(put(torch.ones(2, 1, 3)), put(start), at(2))
    assert torch.equal(get(doubled), start * 2) and (get(cache)[:, 2] == 1).all()


def test_view_of_a_cache_is_not_written_by_the_next_update():
    def function(new, old, position):
        cache = update(new, old, position)[0]
        return [tp.reshape(cache, (2, 3 * S)), cache, tp.reshape(cache, (2, S, 3))]

    compiled = tp.compile(function, args=[info(2, 1, 3), info(2, S, 3), info(1, dtype=tp.int32)])
    flat, cache, same = compiled(put(torch.ones(2, 1, 3)), put(torch.zeros(2, S, 3)), at(0))
    compiled(put(torch.full((2, 1, 3), 5.0)), cache, at(0))
    assert get(flat)[0, 0] == get(same)[0, 0, 0] == get(cache)[0, 0, 0] == 1


def test_random_conditions_are_not_taken_for_slots():
    ramp = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
    kept = tp.Tensor(ramp)

    def function(new, old, position):
        return [tp.where(tp.reshape(kept, (4, 1)) == tp.reshape(position, (1, 1)), new, old)]

    compiled = tp.compile(function, args=[info(1, 3), info(4, 3), info(1, dtype=tp.int32)])
    out = get(compiled(put(torch.ones(1, 3)), put(torch.zeros(4, 3)), at(1))[0])
    assert out[:, 0].tolist() == [0, 1, 1, 0]


# -- quantization

INPUTS = torch.tensor([-1000.0, -1.5, -0.5, 0.49, 0.5, 1.5, 2.5, 1000.0])


def test_int8_rounds_half_to_even_and_saturates():
    q = tp.quantize(tp.Tensor(INPUTS), 1.0, tp.int8)
    assert get(tp.cast(q, tp.int32)).tolist() == [-128, -2, 0, 0, 0, 2, 2, 127]


def test_int4_saturates():
    q = tp.quantize(tp.Tensor(INPUTS), 1.0, tp.int4)
    assert get(tp.dequantize(q, 1.0, tp.float32)).tolist() == [-8, -2, 0, 0, 0, 2, 2, 7]


def test_float8_is_torchs():
    x = torch.randn(1000) * 100
    q = tp.quantize(tp.Tensor(x), 0.5, tp.float8)
    expected = (x / 0.5).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.5
    assert torch.equal(get(tp.dequantize(q, 0.5, tp.float32)), expected)


def quantized(kind, dtype, N=320, K=256, block=128):
    """A quantized product, and what it is by definition."""
    torch.manual_seed(0)
    low, high, quant = {"int8": (-128, 127, tp.int8), "int4": (-8, 7, tp.int4)}[kind[:4]]
    weight = torch.randn(N, K)
    if kind == "int8":
        scale, axis, stored, spread = weight.abs().amax(1) / 127, 0, weight, lambda s: s[:, None]
    elif kind == "int8-in":
        weight = weight.t().contiguous()
        scale, axis, stored, spread = weight.abs().amax(0) / 127, 1, weight, lambda s: s
    elif kind == "int4-out":  # blocks of rows of [out, in]
        scale = weight.reshape(N // 64, 64, K).abs().amax(1) / 7
        axis, stored, spread = None, weight, lambda s: s.repeat_interleave(64, 0)
    else:  # int4-in and int4-odd, blocks of rows of [in, out]: along the input, as ModelOpt's
        weight = weight.t().contiguous()
        scale = weight.reshape(K // block, block, N).abs().amax(1) / 7
        axis, stored, spread = None, weight, lambda s: s.repeat_interleave(block, 0)
    scale = scale.to(dtype)
    q = (stored.to(dtype).float() / spread(scale.float())).round().clamp(low, high)
    dense = (q * spread(scale.float())).to(dtype)
    given, factors = tp.Tensor(stored.to(dtype)), tp.Tensor(scale)
    turned = kind in ("int8", "int4-out")

    def linear(x):
        w = tp.dequantize(tp.quantize(given, factors, quant, axis), factors, getattr(tp, str(dtype)[6:]), axis)
        return x @ (tp.transpose(w, 1, 0) if turned else w)

    return linear, dense.t() if turned else dense


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "int8-in", "int4-out", "int4-in", "int4-odd"])
def test_quantized_products(kind, dtype, rows):
    linear, dense = quantized(kind, dtype, 321 if kind == "int4-odd" else 320)
    x = torch.randn(1, rows, dense.shape[0]).to(dtype)
    ours, expected = run(linear, x), x.double() @ dense.double()
    error = (ours.double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype is torch.float32 else 5e-4)


@pytest.mark.parametrize("fast", [False, True])
def test_scales_can_be_as_large_as_weights(fast, monkeypatch):
    linear, dense = quantized("int4-in", torch.float32, 3072, 768)
    x = torch.randn(1, 1, 768)
    monkeypatch.setattr(tripy_cpu.weights, "BFLOAT16", fast)
    ours, expected = run(linear, x), x.double() @ dense.double()
    assert (ours.double() - expected).norm() / expected.norm() < (1e-2 if fast else 1e-6)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("kind", ["int8", "int4-in"])
def test_bfloat16_products_lie_within_1e_2(kind, rows, monkeypatch):
    linear, dense = quantized(kind, torch.float32)
    x = torch.randn(1, rows, dense.shape[0])
    exact = x.double() @ dense.double()
    monkeypatch.setattr(tripy_cpu.weights, "BFLOAT16", True)
    ours = run(linear, x)
    assert 1e-4 < (ours.double() - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind, size", [("int8", 0.27), ("int4-in", 0.15)])
def test_quantized_weights_are_held_at_their_size(kind, size, fast, monkeypatch):
    linear, dense = quantized(kind, torch.float32, 1024, 1024)
    monkeypatch.setattr(tripy_cpu.weights, "BFLOAT16", fast)
    program = tp.compile(linear, args=[info(1, 1024)])
    x = put(torch.randn(1, 1024))
    program(x)
    held = program._executable.constants.values()
    tensors = {id(t): t for value in held for t in vars(value).values() if torch.is_tensor(t) and not t.is_meta}
    assert sum(t.nbytes for t in tensors.values()) < size * 4 * dense.numel()


# -- a CPU that lacks instructions


def refuse(*args):
    raise RuntimeError("mkldnn: this kernel needs avx512bw, avx512vl and avx512dq")


def saturate(product):
    """As int8 kernels do without VNNI: sums of two products are held in 16 bits."""
    return lambda x, q, *rest: product(x, q.clamp(-64, 64), *rest)


@pytest.mark.parametrize(
    ("kernel", "kind", "instead"),
    [
        ("_weight_int8pack_mm", "int8", refuse),
        ("_weight_int8pack_mm", "int8", saturate(torch._weight_int8pack_mm)),
        ("_weight_int4pack_mm_for_cpu", "int4-in", refuse),
        ("_convert_weight_to_int4pack_for_cpu", "int4-in", refuse),
    ],
)
def test_fast_is_exact_and_says_so_without_a_kernel_that_computes_right(kernel, kind, instead, monkeypatch):
    monkeypatch.setattr(tripy_cpu.weights, "BFLOAT16", None)
    monkeypatch.setattr(torch, kernel, instead)
    words = choose_device("auto", fast=True)
    assert words.endswith("quantized weights multiplied in float32 (torch has no faster kernel for this CPU)")
    linear, dense = quantized(kind, torch.float32)
    x = torch.randn(1, 1, dense.shape[0])
    assert torch.allclose(run(linear, x), x @ dense, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_multiplied_in_float32_without_a_kernel(dtype, monkeypatch):
    product = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: refuse() if x.dtype is dtype else product(x, *rest))
    words = choose_device("auto")
    assert words.endswith("float16 and bfloat16 multiplied in float32 (torch has no faster kernel for this CPU)")
    weight, x = torch.randn(192, 160).to(dtype), torch.randn(1, 160).to(dtype)
    kept = tp.Tensor(weight)
    agree(run(lambda x: x @ tp.transpose(kept, 1, 0), x), (x.double() @ weight.double().t()).to(dtype))


def test_this_cpus_kernels_are_used_where_they_compute_right(monkeypatch):
    monkeypatch.setattr(tripy_cpu.weights, "BFLOAT16", None)
    assert choose_device("auto") == f"cpu: {tripy_cpu.ENGINE}"
    assert choose_device("auto", fast=True) == f"cpu: {tripy_cpu.ENGINE}, quantized weights multiplied in bfloat16"


# -- files


def cached(path, kind="int4-in"):
    linear, _ = quantized(kind, torch.float32)
    kept = tp.Tensor(torch.randn(256, 256))
    program = tp.compile(lambda x: [linear(x @ kept), x], args=[tp.InputInfo((1, (1, 2, 4), 256), dtype=tp.float32)])
    program.save(str(path))
    return program


@pytest.mark.parametrize("kind", ["int8", "int4-in"])
@pytest.mark.parametrize("fast", [False, True])
def test_save_and_load(tmp_path, kind, fast, monkeypatch):
    monkeypatch.setattr(tripy_cpu.weights, "BFLOAT16", fast)
    first = cached(tmp_path / "a.executable", kind)
    x = put(torch.randn(1, 3, 256))
    expected = get(first(x)[0])
    first.save(str(tmp_path / "b.executable"))  # after it has run, too
    for name in ("a.executable", "b.executable"):
        again = tp.Executable.load(str(tmp_path / name))
        assert torch.equal(get(again(x)[0]), expected)


def test_saved_programs_hold_data_only(tmp_path):
    cached(tmp_path / "a.executable")
    data = (tmp_path / "a.executable").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(header["__metadata__"]["tripy_cpu"])["format"] == "tripy_cpu 3"
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} <= {"F32", "I8", "I32", "BOOL"}


@pytest.mark.parametrize("spoil", ["half", "empty", "pickle", "foreign", "operation", "name"])
def test_spoilt_programs_are_refused(tmp_path, spoil):
    path = tmp_path / "a.executable"
    cached(path)
    data = path.read_bytes()
    changed = {
        "half": data[: len(data) // 2],
        "empty": b"",
        "pickle": b"\x80\x04\x95" + data[3:],
        "foreign": data.replace(b"tripy_cpu 3", b"tripy_cpu 9"),
        "operation": data.replace(b"matmul.MatrixMultiply", b"matmul.MatrixMultiplx"),
        "name": data.replace(b']], [[\\"%t', b']], [[\\"%u'),
    }[spoil]
    assert changed != data
    path.write_bytes(changed)
    with pytest.raises(tp.TripyException, match="no executable for the CPU"):
        tp.Executable.load(str(path))


def test_equal_weights_are_held_once():
    weight = torch.randn(300, 300)
    programs = []
    for _ in range(2):
        kept = tp.Tensor(weight.clone())
        programs.append(tp.compile(lambda x, kept=kept: x @ kept, args=[info(1, 300)]))
        programs[-1](put(torch.randn(1, 300)))
    first, second = (next(iter(p._executable.constants.values())) for p in programs)
    assert first.weight is second.weight and torch.equal(first.tensors()[0], weight.t())


def test_table_and_head_can_be_one_weight(tmp_path):
    table = torch.randn(300, 200)
    kept = tp.Tensor(table)
    program = tp.compile(
        lambda i: tp.gather(kept, 0, i) @ tp.transpose(kept, 1, 0), args=[info((1, 2, 4), dtype=tp.int32)]
    )
    for count in (2, 1, 4):
        ids = torch.arange(count, dtype=torch.int32) * 7
        assert torch.allclose(get(program(put(ids))), table[ids.long()] @ table.t(), atol=1e-3)
    program.save(str(tmp_path / "a.executable"))
    again = tp.Executable.load(str(tmp_path / "a.executable"))
    assert torch.equal(get(again(put(ids))), get(program(put(ids))))
