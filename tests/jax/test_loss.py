"""The training loss: the plain one's value and gradients, in chunks, with a padded vocabulary, and no product of a
bfloat16 step in float32."""

import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src.ad_checkpoint import saved_residuals

from jax_nanogpt import loss as training_loss
from jax_nanogpt.config import Config
from jax_nanogpt.kernels import choose_kernels
from jax_nanogpt.loss import losses, mean_loss
from jax_nanogpt.model import GPT, GPTConfig, Kernels, init_params, stack_layers
from jax_nanogpt.optimizer import make_optimizer
from jax_nanogpt.train import train_iterations

pytestmark = pytest.mark.engine

TINY = GPTConfig(block_size=64, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
EXAMPLES = np.random.default_rng(0).integers(50, size=(4, 65))
ROWS = jnp.arange(4, dtype=jnp.uint32)
CASES = {  # the kernels, and the logits of a chunk
    "whole": (Kernels(), 2**27),
    "padded, 4 chunks": (Kernels(vocab_multiple=128), 50 * 64),
    "8 chunks for want of a divisor": (Kernels(), 50 * 48),
}


@pytest.fixture(scope="module")
def params():
    return init_params(TINY, jax.random.key(0))


@pytest.mark.parametrize(("kernels", "chunk"), CASES.values(), ids=CASES)
def test_the_loss_and_gradients_are_those_of_whole_logits(kernels, chunk, params, monkeypatch):
    monkeypatch.setattr(training_loss, "CHUNK_BYTES", 4 * chunk)
    model = GPT(TINY, kernels)

    def plain(p):
        logits, _ = GPT(TINY).apply({"params": p}, EXAMPLES[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, EXAMPLES[:, 1:])

    expected, gradients = jax.jit(jax.value_and_grad(lambda p: 3 * plain(p).mean()))(params)
    found = jax.jit(jax.value_and_grad(lambda p: 3 * mean_loss(model, p, EXAMPLES, ROWS, jax.random.key(0))))(params)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves((expected, gradients)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_allclose(jax.jit(losses, static_argnums=0)(model, params, EXAMPLES), plain(params), atol=1e-5)


def test_the_logits_are_never_whole(params, monkeypatch):
    """In the training step and in evaluation, forward and back."""
    monkeypatch.setattr(training_loss, "CHUNK_BYTES", 4 * 50 * 64)
    model = GPT(TINY, Kernels(vocab_multiple=56))
    step = jax.jit(jax.value_and_grad(lambda p: mean_loss(model, p, EXAMPLES, ROWS, jax.random.key(0))))
    programs = step.lower(params), jax.jit(losses, static_argnums=0).lower(model, params, EXAMPLES)
    for program in programs:
        shapes = set(re.findall(r"(?:f32|bf16)\[([\d,]+)\]", program.compile().as_text()))
        assert "64,56" in shapes  # a chunk
        sizes = {name: np.prod([*map(int, name.split(","))]) for name in shapes}
        assert not [name for name, size in sizes.items() if size in (4 * 64 * 50, 4 * 64 * 56)]


# --- the whole step in bfloat16, lowered for accelerators that are not here


def lower(model, rule, params, platform):
    """The training step in StableHLO."""
    state = params, jax.eval_shape(rule.init, params)
    traced = train_iterations.trace(model, rule, *state, EXAMPLES[None, None], 0, 1, jax.random.key(0))
    return traced.lower(lowering_platforms=(platform,)).as_text()


def kernels_of(platform):
    device = SimpleNamespace(platform="gpu" if platform == "cuda" else platform, compute_capability="9.0")
    device.client = SimpleNamespace(platform_version="cuda 12090")
    return choose_kernels(device, "bfloat16")


def products(text):
    """The element types of each dot_general's operands and result."""
    found = re.findall(r"stablehlo\.dot_general.*: \(tensor<(\S*)>, tensor<(\S*)>\) -> tensor<(\S*)>", text)
    assert len(found) == text.count("stablehlo.dot_general")
    return [array.rpartition("x")[2] for product in found for array in product]


@pytest.mark.usefixtures("with_cudnn")
@pytest.mark.parametrize(
    ("platform", "optimizer", "scanned"),
    [("cuda", "adamw", False), ("cuda", "muon", True), ("tpu", "adamw", True), ("tpu", "muon", False)],
)
def test_no_product_of_a_bfloat16_step_has_float32_operands(platform, optimizer, scanned, params):
    """Nor a result in it: the logits' would be the largest array."""
    rule = make_optimizer(Config(dtype="bfloat16", optimizer=optimizer))
    model = GPT(replace(TINY, dtype="bfloat16"), kernels_of(platform))
    found = products(lower(model, rule, stack_layers(params) if scanned else params, platform))
    assert len(found) > 30 and set(found) == {"bf16"}


@pytest.mark.usefixtures("with_cudnn")
def test_a_gpu_neither_transposes_activations_nor_keeps_those_of_gelu(params):
    model = GPT(replace(TINY, dtype="bfloat16"), kernels_of("cuda"))
    text = lower(model, make_optimizer(Config(dtype="bfloat16")), params, "cuda")
    summed = re.findall(r"stablehlo\.dot_general.* contracting_dims = \[(.*?)\] x \[(.*?)\]", text)
    assert len(summed) > 10 and not [axes for pair in summed for axes in pair if "," in axes]
    assert len(re.findall(r"@LayoutConstraint\(.*xbf16>", text)) == 2  # forward and back
    assert text.count("stablehlo.tanh") == 2 * TINY.n_layer  # forward, and again back


def test_scanned_layers_are_the_same_model(params):
    """Their loss and gradients; with remat too. Dropout's masks are others."""
    for config in TINY, replace(TINY, remat=True):
        loss = lambda p, config=config: mean_loss(GPT(config), p, EXAMPLES, ROWS, jax.random.key(0))  # noqa: E731
        plain, scanned = map(jax.jit(jax.value_and_grad(loss)), (params, stack_layers(params)))
        for ours, theirs in zip(jax.tree.leaves(scanned), jax.tree.leaves(stack_layers(plain)), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_scanned_layers_keep_little_but_products_for_the_backward_pass(params):
    """A scan writes all that it keeps to memory; of layers that are not scanned, XLA fuses most of it away."""
    loss = lambda p: mean_loss(GPT(TINY), p, EXAMPLES, ROWS, jax.random.key(0))  # noqa: E731
    plain, scanned = (sum(array.size for array, _ in saved_residuals(loss, p)) for p in (params, stack_layers(params)))
    assert scanned < 0.5 * plain
