"""Training: resuming, accumulation, dropout, evaluation, signals, and what a run writes."""

import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_nanogpt import metrics, train, weight_loader
from jax_nanogpt.checkpoint import Checkpoints
from jax_nanogpt.data.corpus import write_characters
from jax_nanogpt.kernels import choose_kernels
from jax_nanogpt.loss import losses
from jax_nanogpt.model import GPT, GPTConfig, init_params
from jax_nanogpt.sharding import make_mesh
from jax_nanogpt.start import Start, first_state
from shared.tokenizer import Characters, load_tokenizer
from tests.jax import reference
from tests.jax.runs import MESH_RUN, TINY, environment, losses_of, same, state

TEXT = np.random.default_rng(0).integers(50, size=(2, 4, 17)).astype(np.int32)
TOY = GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=32)
toy_params = cache(partial(init_params, TOY, jax.random.key(0)))
sgd = cache(optax.sgd)
one_window = jax.jit(losses, static_argnums=0)
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def refused(run, out_dir, *flags):
    with pytest.raises(SystemExit) as caught:
        run(out_dir, *flags)
    assert caught.value.code == 2


@pytest.mark.parametrize("flags", [(), MESH_RUN], ids=["adamw", "muon"])
def test_stopped_and_resumed_equals_unbroken_to_the_bit(flags, run, tmp_path, no_chart):
    run(tmp_path / "whole", "--max_iters=11", *flags)
    run(tmp_path / "parts", "--max_iters=6", *flags)
    run(tmp_path / "parts", "--max_iters=11", "--init_from=resume", *flags)
    assert same(state(tmp_path / "whole"), state(tmp_path / "parts"))
    assert losses_of(tmp_path / "whole")[11] == losses_of(tmp_path / "parts")[11]


def test_another_seed_is_another_run(run, tmp_path, no_chart):
    for seed in 1, 2:
        run(tmp_path / f"{seed}", "--max_iters=1", f"--seed={seed}")
    one, other = (losses_of(tmp_path / f"{seed}") for seed in (1, 2))
    assert one[0] != other[0] and one[1] != other[1]


def test_a_checkpoint_is_judged_by_its_val_loss(finished):
    checkpoints, losses = Checkpoints(finished), losses_of(finished)
    for step in checkpoints.manager.all_steps():
        assert checkpoints.manager.metrics(step) == {"val_loss": losses[step]}
        assert losses[step] != losses_of(finished, "train_loss")[step]


def iterations(config, examples, count, rate, first=0, seed=0):
    """(params, losses) of train_iterations with plain gradient descent."""
    params, optimizer, key = jax.tree.map(jnp.copy, toy_params()), sgd(rate), jax.random.key(seed)
    state = params, optimizer.init(params)
    params, _, history = train.train_iterations(GPT(config), optimizer, *state, examples, first, count, key)
    return params, np.array(history[0, :count])


def test_accumulating_four_batches_of_one_equals_one_batch_of_four():
    """Under gradient descent at a rate of 1, the parameters move by the gradients themselves."""
    four, losses_of_four = iterations(TOY, TEXT[:, :, None], 2, rate=1.0)
    one, losses_of_one = iterations(TOY, TEXT[:, None], 2, rate=1.0)
    np.testing.assert_allclose(losses_of_four, losses_of_one, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), four, one)


def test_each_iteration_and_micro_batch_has_its_own_dropout_mask_by_its_number_and_the_seed():
    """Of the same text each time, at a learning rate of 0: the losses differ by the masks alone."""
    config, text = replace(TOY, dropout=0.5), np.broadcast_to(TEXT[0, 0], (80, 4, 1, 17))
    _, ones = iterations(config, text[:, :1], 80, rate=0.0)
    _, fours = iterations(config, text, 80, rate=0.0)
    assert len(set(ones)) == 80
    assert fours.std() / ones.std() == pytest.approx(0.5, rel=0.3)  # each a mean of four independent losses
    _, later = iterations(config, text[:, :1], 4, rate=0.0, first=6)
    np.testing.assert_array_equal(later, ones[6:10])
    _, other = iterations(config, text[:, :1], 80, rate=0.0, seed=1)
    assert not set(other) & set(ones)


def test_the_losses_of_both_splits_are_those_that_transformers_gives(run, dataset, tmp_path, no_chart):
    """Over every window, without dropout, with the weights that the run saved."""
    torch = pytest.importorskip("torch")
    run(tmp_path / "out", "--max_iters=3", "--eval_iters=10000")
    weight_loader.save(tmp_path / "model", *Checkpoints(tmp_path / "out").restore_model(3))
    model = reference.load(tmp_path / "model")
    for split in "train", "val":
        data = np.fromfile(dataset / f"{split}.bin", np.uint16).astype(np.int64)
        windows = np.array([data[i : i + 17] for i in range(0, len(data) - 16, 16)])
        logits = torch.tensor(reference.logits_of(model, windows[:, :-1]))
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(windows[:, 1:]).flatten())
        assert losses_of(tmp_path / "out", f"{split}_loss")[3] == pytest.approx(expected.item(), rel=1e-5)


def test_bfloat16_learns_as_float32_does(run, tmp_path, no_chart):
    for dtype in "float32", "bfloat16":
        run(tmp_path / dtype, "--max_iters=40", f"--dtype={dtype}")
    exact, rough = (losses_of(tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    assert exact[40] < exact[0] - 0.8
    assert 0 < abs(exact[40] - rough[40]) < 0.1  # on most texts and seeds 0.002, on some 0.07
    assert {array.dtype for array in state(tmp_path / "bfloat16")[1]} == {np.dtype("float32"), np.dtype("int32")}


@pytest.mark.parametrize("tokens", [17, 100, 16 * 12 + 1])
def test_evaluation_is_the_mean_over_every_window_once(tokens):
    config = train.Config(block_size=16, batch_size=4, eval_iters=1000)
    data = np.random.default_rng(0).integers(50, size=tokens).astype(np.uint16)
    windows = [data[i : i + 17].astype(np.int32)[None] for i in range(0, tokens - 16, 16)]
    model, params = GPT(TOY), toy_params()
    expected = float(np.mean([one_window(model, params, window) for window in windows]))
    assert train.evaluate(model, params, data, config, 4, HERE) == pytest.approx(expected, rel=1e-6)


def test_a_run_prints_and_writes_its_losses(run, tmp_path):
    (tmp_path / "vocab.json").write_text("of another model", encoding="utf-8")
    printed = run(tmp_path, "--max_iters=20", "--eval_interval=10")
    first, *lines = printed.splitlines()
    assert re.fullmatch(r"GPT \(0\.0M parameters\) on cpu: jax [\d.]+", first)
    pattern = r"iter (\d+) loss: train loss (\d\.\d{4}), val loss (\d\.\d{4})"
    found = {int(m[1]): float(m[3]) for line in lines if line if (m := re.fullmatch(pattern, line))}
    assert found == pytest.approx(losses_of(tmp_path), abs=1e-4) and list(found) == [0, 10, 20]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "meta.json").exists() and not list(tmp_path.glob("*.part"))
    assert not (tmp_path / "vocab.json").exists()  # a former run's tokenizer


def test_a_row_has_the_learning_rate_and_the_norm_of_the_gradients(run, tmp_path, no_chart):
    """By one iteration of gradient descent at a rate of a half: the parameters move by half of the gradients."""
    examples, start = TEXT[:1, None], toy_params()
    params, optimizer = jax.tree.map(jnp.copy, start), sgd(0.5)
    end, _, history = train.train_iterations(
        GPT(TOY), optimizer, params, optimizer.init(params), examples, 0, 1, jax.random.key(0)
    )
    moved = jax.tree.map(jnp.subtract, start, end)
    assert float(history[1, 0]) == pytest.approx(2 * float(optax.tree.norm(moved)), rel=1e-4)
    run(tmp_path, "--max_iters=12", "--grad_clip=1e-3")
    rates, norms = losses_of(tmp_path, "learning_rate"), losses_of(tmp_path, "grad_norm")
    fraction = train.schedule(train.Config(warmup_iters=5, lr_decay_iters=40, min_lr=1e-3, learning_rate=1e-2))
    assert rates == pytest.approx({last: 1e-2 * float(fraction(last - 1)) for last in (4, 8, 12)}, rel=1e-5)
    assert all(norm > 0.1 for norm in norms.values())  # before clipping
    assert losses_of(tmp_path, "mfu") == {}  # a CPU's peak is not known


def test_mfu_is_a_part_of_the_peak_of_all_devices_where_it_is_known(run, tmp_path, no_chart, monkeypatch):
    monkeypatch.setattr(train, "peak_tflops", lambda device, dtype: 1e-9)
    run(tmp_path, "--max_iters=4")
    ((_, mfu),), seconds = losses_of(tmp_path, "mfu").items(), losses_of(tmp_path, "s_per_iter")[4]
    model = Checkpoints(tmp_path).restore_model(4)[0]
    assert mfu == pytest.approx(train.flops_per_token(model) * 4 * 2 * 16 / seconds / 1e3, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 80GB HBM3", "float32", None),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5", "bfloat16", 459),
        ("cpu", "bfloat16", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name(kind, dtype, peak):
    assert metrics.peak_tflops(SimpleNamespace(device_kind=kind), dtype) == peak


def test_without_a_terminal_there_is_a_line_every_log_interval_and_no_bar(run, tmp_path, no_chart):
    run(tmp_path, "--max_iters=20", "--log_interval=10")
    line = r"iter (\d+): loss \d\.\d{3}, learning rate \d\.\d\de-\d\d, gradient norm \d+\.\d\d, "
    line += r"[\d,]+ tokens/s, \S+ TFLOP/s"
    lines = run.errors.splitlines()
    assert [int(re.fullmatch(line, text)[1]) for text in lines] == [12, 20]  # calls are of four iterations


@pytest.mark.parametrize("iterations", [4, 8, 24])
def test_profile_writes_a_trace_of_the_second_to_the_fourth_call(iterations, run, tmp_path, no_chart, monkeypatch):
    """Calls are of four iterations; a run may end before the trace does."""
    calls, real = [], train.train_iterations

    def count_calls(*args):
        calls.append(len(list(tmp_path.glob("trace/**/*.xplane.pb"))))
        return real(*args)

    monkeypatch.setattr(train, "train_iterations", count_calls)
    run(tmp_path / "out", f"--max_iters={iterations}", f"--profile={tmp_path / 'trace'}")
    written = len(list(tmp_path.glob("trace/**/*.xplane.pb")))
    assert calls == [0, 0, 0, 0, 1, 1][: iterations // 4] and written == int(iterations > 4)


def test_eval_only_gives_the_same_loss_and_writes_nothing(run, finished):
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    printed = run(finished, "--init_from=resume", "--eval_only")
    assert f"val loss {losses_of(finished)[6]:.4f}" in printed
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before


def test_fine_tuning_starts_from_a_checkpoint_and_crops_it(run, dataset, tmp_path, no_chart):
    config = replace(TOY, block_size=24, vocab_size=load_tokenizer(dataset).n_vocab)
    params = init_params(config, jax.random.key(0))
    params["wte"] *= 20  # unlike fresh parameters
    weight_loader.save(tmp_path / "from", config, params, tokenizer_folder=dataset)
    run(tmp_path / "tuned", f"--init_from={tmp_path / 'from'}", "--max_iters=10", "--schedule=constant")
    cropped, params = weight_loader.crop(config, params, 16)
    data, sizes = np.fromfile(dataset / "val.bin", np.uint16), train.Config(block_size=16, batch_size=4, eval_iters=3)
    model = GPT(replace(cropped, dropout=0.2), choose_kernels(jax.devices()[0], "float32"))  # the run's, compiled
    expected, found = train.evaluate(model, params, data, sizes, 4, HERE), losses_of(tmp_path / "tuned")
    assert found[0] == pytest.approx(expected, rel=1e-5) and found[10] < found[0]
    assert Checkpoints(tmp_path / "tuned").restore_model(10)[0].block_size == 16


def test_mistakes_end_in_one_line_and_status_2(run, finished, dataset, tmp_path, capsys):
    write_characters(tmp_path, "other letters" * 20)
    few = tmp_path / "few"
    shutil.copytree(dataset, few)
    Characters("abc").save(few)
    shutil.copytree(few, tmp_path / "odd")
    (tmp_path / "odd" / "train.bin").write_bytes(b"\0" * 1001)
    resume = "--init_from=resume", f"--out_dir={finished}"
    messages = {
        ("--init_from=nowhere",): "'nowhere'",
        ("--dataset=nowhere",): "(python data/NAME/prepare.py writes them), got 'nowhere'",
        ("--block_size=100000",): "must hold more than block_size (100000) uint16 tokens",
        (f"--dataset={few}",): "must hold tokens below the tokenizer's 3, got",
        (f"--dataset={tmp_path / 'odd'}",): "uint16 tokens, got 1001 bytes",
        (f"--out_dir={tmp_path / 'meta.json'}",): "out_dir must be a folder, got",
        (f"--out_dir={tmp_path / 'meta.json' / 'x'}",): "Not a directory",
        (*resume, "--max_iters=6"): "max_iters must be above 6",
        (*resume, "--max_iters=9", "--n_layer=7"): "n_layer must be 1, as in",
        (*resume, f"--dataset={tmp_path}"): "dataset must have the tokens that",
        (*resume, "--optimizer=muon"): "optimizer must be adamw, as in",
        ("--max_iter=3",): "unknown setting max_iter; did you mean max_iters?",
    }
    for flags, message in messages.items():
        refused(run, tmp_path / "none", *flags)
        captured = capsys.readouterr()
        assert captured.err.startswith("train.py: error: ") and captured.err.count("\n") == 1, captured.err
        assert message in captured.err and "iter 0" not in captured.out
    assert not (tmp_path / "none").exists()


def test_a_bug_keeps_its_traceback(run, tmp_path, monkeypatch):
    """A ValueError of the model is not a user's mistake."""

    def broken(*_):
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr(train, "train_iterations", broken)
    with pytest.raises(ValueError, match="broadcast"):
        run(tmp_path, "--max_iters=2")


@pytest.mark.parametrize(("loss", "name"), [(jnp.nan, "NaN"), (jnp.inf, "inf")])
def test_a_nan_loss_ends_the_run_and_costs_no_checkpoint(loss, name, run, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "out")
    monkeypatch.setattr(
        train, "train_iterations", lambda model, opt, *state: (*state[:2], np.array([[1.0, loss, 1, 1], 4 * [1]]))
    )
    with pytest.raises(SystemExit, match=rf"^{name} loss at iteration 8; last good checkpoint: iteration 6 in .*/out$"):
        run(tmp_path / "out", "--max_iters=20", "--init_from=resume")
    assert Checkpoints(tmp_path / "out").last() == 6
    assert losses_of(tmp_path / "out", "loss") == losses_of(finished, "loss")


def test_an_interrupt_saves_and_says_how_to_resume(run, dataset, tmp_path, monkeypatch, capsys):
    calls, read = [], train.read

    def read_and_interrupt(data, starts, *args):
        if starts.ndim == 3:  # not an evaluation's
            calls.append(starts)
            if len(calls) == 3:  # the examples of a third call, while the devices run the second
                signal.raise_signal(signal.SIGINT)
        return read(data, starts, *args)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "read", read_and_interrupt)
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=1000"]
    assert train.main(flags) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped at iteration 8; resume with --init_from=resume"
    assert signal.getsignal(signal.SIGINT) == before
    assert state(tmp_path)[0] == 8 and list(losses_of(tmp_path)) == [0]  # saved at once, without an evaluation
    monkeypatch.undo()
    run(tmp_path, "--init_from=resume", "--max_iters=9")
    assert state(tmp_path)[0] == 9 and list(losses_of(tmp_path)) == [0, 9]


def test_a_run_stopped_where_it_would_evaluate_does_so_when_it_resumes(run, tmp_path, monkeypatch, no_chart):
    step = train.Run.step

    def step_and_stop(self):
        step(self)
        if self.iteration == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train.Run, "step", step_and_stop)
    run(tmp_path, "--max_iters=10", "--eval_interval=4")
    assert state(tmp_path)[0] == 4 and list(losses_of(tmp_path)) == [0]
    monkeypatch.undo()
    run(tmp_path, "--max_iters=10", "--eval_interval=4", "--init_from=resume")
    assert list(losses_of(tmp_path)) == [0, 4, 8, 10]


def test_the_source_of_a_fine_tuning_is_not_kept_in_memory():
    start, config = Start(TOY, Path(), params=jax.tree.map(jnp.copy, toy_params())), train.Config()
    mesh = make_mesh("", jax.devices(), config.batch_size, TOY, parameters=10**4)
    _, params, _ = first_state(config, start, mesh, train.make_optimizer(config))
    assert not start.params and np.array_equal(params["wte"], toy_params()["wte"])


def test_settings_that_change_on_resuming_are_logged(run, finished, tmp_path, monkeypatch, no_chart):
    flags = ("--init_from=resume", "--seed=5", "--draw=epochs")
    shutil.copytree(finished, tmp_path / "other")
    run(tmp_path / "other", *flags, "--max_iters=8")
    assert "settings changed since the former run: draw epochs (was anywhere), seed 5 (was 1337)" in run.errors
    monkeypatch.setattr(train, "train", lambda setup: 0)
    run(tmp_path / "other", *flags, "--max_iters=9", "--eval_interval=1")
    assert run.errors == ""


def test_help_describes_every_setting_by_the_comment_beside_it(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, "--help")
    printed = capsys.readouterr().out
    described = dict(re.findall(r"^  (--\w+=\S*) +(\S.*)$", printed, re.M))
    assert caught.value.code == 0
    assert list(described) == [f"--{name}={value}" for name, value in vars(train.Config()).items()]
    assert described["--grad_clip=1.0"] == "the largest norm of the gradients; 0: none"
    assert "\nbatches: an iteration's tokens are" in printed


def test_help_and_a_mistake_wait_for_neither_matplotlib_nor_orbax():
    code = "import sys\nfrom jax_nanogpt import train\n"
    code += "try: train.main(['--max_iter=1'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'matplotlib', 'orbax.checkpoint', 'tensorstore'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=environment())
    assert (done.returncode, done.stdout) == (0, "[]\n")


def test_a_run_with_scanned_layers_is_the_plain_one_and_writes_the_same_checkpoints(run, tmp_path, no_chart):
    """Also where one resumes the other's; without dropout, whose masks are others."""
    flags = "--n_layer=2", "--dropout=0", *MESH_RUN
    run(tmp_path / "plain", *flags, "--max_iters=4")
    run(tmp_path / "scanned", *flags, "--max_iters=2", "--scan_layers")
    run(tmp_path / "scanned", *flags, "--max_iters=3", "--init_from=resume")
    run(tmp_path / "scanned", *flags, "--max_iters=4", "--init_from=resume", "--scan_layers")
    for ours, theirs in zip(state(tmp_path / "scanned")[1], state(tmp_path / "plain")[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert losses_of(tmp_path / "scanned")[4] == pytest.approx(losses_of(tmp_path / "plain")[4], abs=1e-5)
