"""Training: what is claimed of resuming, of kills, of accumulation, of evaluation, of what a run leaves behind."""

import re
import signal
import time
from dataclasses import replace
from functools import cache, partial
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_nanogpt import train, weight_loader
from jax_nanogpt.checkpoint import Checkpoints
from jax_nanogpt.data.corpus import write_characters
from jax_nanogpt.model import GPT, GPTConfig, init_params
from shared.tokenizer import Characters, load_tokenizer
from tests.jax import reference
from tests.jax.runs import TINY, losses_of, same, start, state

TEXT = np.random.default_rng(0).integers(50, size=(2, 4, 17)).astype(np.int32)
TOY = GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=32)
toy_params = cache(partial(init_params, TOY, jax.random.key(0)))
sgd = cache(optax.sgd)


@pytest.fixture(autouse=True, scope="module")
def programs():
    """Runs with the same settings share an optimizer, and by that JAX's compiled program."""
    made, make = {}, train.make_optimizer

    def make_once(config):
        key = tuple(value for name, value in vars(config).items() if name not in train.FREE)
        return made.setdefault(key, make(config))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_optimizer", make_once)
        yield


def refused(run, out_dir, *flags):
    with pytest.raises(SystemExit) as caught:
        run(out_dir, *flags)
    assert caught.value.code == 2


@pytest.mark.parametrize("flags", [["--optimizer=adamw"], ["--optimizer=muon", "--muon_weight_decay=0.1"]])
def test_stopped_and_resumed_equals_unbroken_to_the_bit(flags, run, tmp_path):
    run(tmp_path / "whole", "--max_iters=23", *flags)
    run(tmp_path / "parts", "--max_iters=14", *flags)
    run(tmp_path / "parts", "--max_iters=23", "--init_from=resume", *flags)
    assert same(state(tmp_path / "whole"), state(tmp_path / "parts"))
    assert losses_of(tmp_path / "whole")[23] == losses_of(tmp_path / "parts")[23]


def test_another_seed_is_another_run(run, tmp_path):
    for seed in 1, 2:
        run(tmp_path / f"{seed}", "--max_iters=1", f"--seed={seed}")
    one, other = (losses_of(tmp_path / f"{seed}") for seed in (1, 2))
    assert one[0] != other[0] and one[1] != other[1]


def test_a_kill_in_saving_loses_only_what_came_after_the_last_checkpoint(run, dataset, tmp_path):
    out_dir = tmp_path / "killed"
    folder = out_dir / "checkpoints"
    process = start(dataset, out_dir, "--max_iters=100000", "--eval_interval=2")
    while not ((folder / "2").exists() and any(folder.glob("*tmp*"))):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    process.kill()
    process.wait()
    last, _ = state(out_dir)
    assert last >= 2
    flags = (f"--max_iters={last + 3}", "--eval_interval=2")
    run(out_dir, *flags, "--init_from=resume")
    run(tmp_path / "whole", *flags)
    assert same(state(tmp_path / "whole"), state(out_dir))
    assert losses_of(tmp_path / "whole") == losses_of(out_dir)
    assert not any(folder.glob("*tmp*"))


def test_the_best_and_the_last_two_checkpoints_are_kept(tmp_path):
    checkpoints, nothing = Checkpoints(tmp_path, "afresh"), {"count": np.zeros(1)}
    for step, loss in (10, 3.0), (20, 1.0), (30, 2.0), (40, 4.0), (50, 1.5):
        checkpoints.save(step, nothing, nothing, {}, loss)
    assert (checkpoints.best(), checkpoints.last()) == (20, 50)
    assert sorted(checkpoints.manager.all_steps()) == [20, 40, 50]


def test_a_checkpoint_is_judged_by_its_val_loss(run, tmp_path):
    run(tmp_path, "--max_iters=4", "--eval_interval=2")
    found = {step: Checkpoints(tmp_path).manager.metrics(step) for step in (2, 4)}
    assert found == {step: {"val_loss": losses_of(tmp_path)[step]} for step in (2, 4)}


def test_a_fresh_start_puts_the_former_run_aside(run, tmp_path):
    run(tmp_path, "--max_iters=10")
    former = state(tmp_path)
    run(tmp_path, "--max_iters=5")
    assert state(tmp_path)[0] == 5
    (tmp_path / "checkpoints").rename(tmp_path / "new")
    (tmp_path / "checkpoints.old").rename(tmp_path / "checkpoints")
    assert same(state(tmp_path), former)


def iterations(config, examples, count, rate, first=0, seed=0):
    """(params, losses) of train_iterations with plain gradient descent."""
    params, optimizer, key = jax.tree.map(jnp.copy, toy_params()), sgd(rate), jax.random.key(seed)
    state = params, optimizer.init(params)
    params, _, losses = train.train_iterations(GPT(config), optimizer, *state, examples, first, count, key)
    return params, np.array(losses[:count])


def test_accumulating_four_batches_of_one_equals_one_batch_of_four():
    """Under gradient descent at a rate of 1, the parameters move by the gradients themselves."""
    four, losses_of_four = iterations(TOY, TEXT[:, :, None], 2, rate=1.0)
    one, losses_of_one = iterations(TOY, TEXT[:, None], 2, rate=1.0)
    np.testing.assert_allclose(losses_of_four, losses_of_one, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), four, one)


def test_each_iteration_and_micro_batch_has_its_own_dropout_mask_by_its_number_and_the_seed():
    """Of one text again and again, at a rate of 0: the losses differ by the masks alone."""
    config, text = replace(TOY, dropout=0.5), np.broadcast_to(TEXT[0, 0], (80, 4, 1, 17))
    _, ones = iterations(config, text[:, :1], 80, rate=0.0)
    _, fours = iterations(config, text, 80, rate=0.0)
    assert len(set(ones)) == 80
    assert fours.std() / ones.std() == pytest.approx(0.5, rel=0.3)  # each a mean of four independent losses
    _, later = iterations(config, text[:, :1], 4, rate=0.0, first=6)
    np.testing.assert_array_equal(later, ones[6:10])
    _, other = iterations(config, text[:, :1], 80, rate=0.0, seed=1)
    assert not set(other) & set(ones)


def test_the_losses_of_both_splits_are_those_that_transformers_gives(run, tmp_path):
    """Of every window, and without dropout, by the weights that the run saved."""
    torch = pytest.importorskip("torch")
    (tmp_path / "data").mkdir()
    write_characters(tmp_path / "data", topics["if"] + topics["numbers"] * 3)
    flags = ("--max_iters=3", "--eval_iters=1000", "--dropout=0.5", "--batch_size=8")
    run(tmp_path / "out", *flags, f"--dataset={tmp_path / 'data'}")
    weight_loader.save(tmp_path / "model", *Checkpoints(tmp_path / "out").restore_model(3))
    model = reference.load(tmp_path / "model")
    for split in "train", "val":
        data = np.fromfile(tmp_path / "data" / f"{split}.bin", np.uint16).astype(np.int64)
        windows = np.array([data[i : i + 17] for i in range(0, len(data) - 16, 16)])
        logits = torch.tensor(reference.logits_of(model, windows[:, :-1]))
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(windows[:, 1:]).flatten())
        assert losses_of(tmp_path / "out", f"{split}_loss")[3] == pytest.approx(expected.item(), rel=1e-5)
    assert abs(losses_of(tmp_path / "out", "train_loss")[3] - losses_of(tmp_path / "out")[3]) > 0.01


def test_bfloat16_learns_as_float32_does(run, tmp_path):
    for dtype in ("float32", "bfloat16"):
        run(tmp_path / dtype, "--max_iters=40", f"--dtype={dtype}")
    exact, rough = (losses_of(tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    assert exact[40] < exact[0] - 0.8
    assert 0 < abs(exact[40] - rough[40]) < 0.1  # on most texts and seeds 0.002, on some 0.07
    assert {array.dtype for array in state(tmp_path / "bfloat16")[1]} == {np.dtype("float32"), np.dtype("int32")}


@pytest.mark.parametrize("tokens", [17, 100, 16 * 12 + 1, 1000])
def test_evaluation_is_the_mean_over_every_window_once(tokens):
    config = train.Config(block_size=16, batch_size=4, eval_iters=1000)
    data = np.random.default_rng(0).integers(50, size=tokens).astype(np.uint16)
    windows = np.array([data[i : i + 17] for i in range(0, tokens - 16, 16)], np.int32)
    model, params = GPT(TOY), toy_params()
    expected = float(jax.jit(train.losses, static_argnums=0)(model, params, windows).mean())
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert train.evaluate(model, params, data, config, here) == pytest.approx(expected, rel=1e-6)


def test_a_run_prints_and_writes_its_losses(run, tmp_path):
    printed = run(tmp_path, "--max_iters=20", "--eval_interval=10")
    first, *lines = printed.splitlines()
    assert re.fullmatch(r"GPT \(0\.0M parameters\) on cpu: jax [\d.]+", first)
    pattern = r"iter (\d+) loss: train loss (\d\.\d{4}), val loss (\d\.\d{4})"
    found = {int(m[1]): float(m[3]) for line in lines if line if (m := re.fullmatch(pattern, line))}
    assert found == pytest.approx(losses_of(tmp_path), abs=1e-4) and list(found) == [0, 10, 20]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "meta.json").exists() and not list(tmp_path.glob("*.part"))


def test_eval_only_gives_the_same_loss_and_writes_nothing(run, tmp_path):
    run(tmp_path, "--max_iters=10")
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    printed = run(tmp_path, "--init_from=resume", "--eval_only")
    assert f"val loss {losses_of(tmp_path)[10]:.4f}" in printed
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_fine_tuning_starts_from_a_checkpoint_and_crops_it(run, dataset, tmp_path):
    config = replace(TOY, block_size=24, vocab_size=load_tokenizer(dataset).n_vocab)
    params = init_params(config, jax.random.key(0))
    params["wte"] *= 20  # which a fresh start does not have
    weight_loader.save(tmp_path / "from", config, params, tokenizer_folder=dataset)
    run(tmp_path / "tuned", f"--init_from={tmp_path / 'from'}", "--max_iters=10", "--schedule=constant")
    cropped, params = weight_loader.crop(config, params, 16)
    data, here = np.fromfile(dataset / "val.bin", np.uint16), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    sizes = train.Config(block_size=16, batch_size=4, eval_iters=3)
    expected = train.evaluate(GPT(cropped), params, data, sizes, here)
    losses = losses_of(tmp_path / "tuned")
    assert losses[0] == pytest.approx(expected, rel=1e-5) and losses[10] < losses[0]
    assert Checkpoints(tmp_path / "tuned").restore_model(10)[0].block_size == 16


def test_mistakes_end_in_one_line_and_status_2(run, dataset, tmp_path, capsys):
    run(tmp_path / "first", "--max_iters=2")
    write_characters(tmp_path, "other letters" * 20)
    complaints = {
        ("--init_from=resume",): "none, which holds no checkpoint",
        ("--init_from=nowhere",): "'nowhere'",
        ("--dataset=nowhere",): "which has no train.bin and val.bin: python data/nowhere/prepare.py writes them",
        ("--block_size=100000",): "two a token for more than block_size (100000) are expected",
        (f"--out_dir={tmp_path / 'meta.json'}",): "meta.json, a folder is expected",
        (f"--out_dir={tmp_path / 'meta.json' / 'x'}",): "Not a directory",
        ("--out_dir=",): "out_dir is '', a folder is expected",
        ("--seed=18446744073709551616",): "below 2**63 is expected",
        ("--init_from=resume", f"--out_dir={tmp_path / 'first'}", "--max_iters=2"): "more than the 2 made",
        ("--init_from=resume", f"--out_dir={tmp_path / 'first'}", "--max_iters=9", "--n_layer=7"): "trained with 2",
        ("--device=abacus",): "device is abacus, one of auto, cpu, gpu, tpu is expected",
        ("--device=tpu",): "device is tpu, but JAX finds only: cpu",
        ("--max_iter=3",): "max_iter is no setting; near are: max_iters",
        (f"--dataset={tmp_path}", "--init_from=resume", f"--out_dir={tmp_path / 'first'}"): "whose tokens are not",
        ("--optimizer=muon", "--init_from=resume", f"--out_dir={tmp_path / 'first'}"): "was trained with adamw",
    }
    for flags, complaint in complaints.items():
        refused(run, tmp_path / "none", *flags)
        captured = capsys.readouterr()
        assert complaint in captured.err and captured.err.count("\n") == 1 and "iter 0" not in captured.out
    assert not (tmp_path / "none").exists()


def test_a_loss_that_is_no_number_ends_the_run_and_costs_no_checkpoint(run, tmp_path):
    run(tmp_path, "--max_iters=2")
    with pytest.raises(SystemExit, match=r"the loss is (nan|inf) at iteration .*last good checkpoint: iteration 2 in"):
        run(tmp_path, "--max_iters=20", "--init_from=resume", "--learning_rate=1e38", "--min_lr=1e38", "--grad_clip=0")
    assert Checkpoints(tmp_path).last() == Checkpoints(tmp_path).best() == 2
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")


def test_fresh_starts_that_come_to_nothing_leave_the_former_run_aside(run, tmp_path):
    run(tmp_path, "--max_iters=10")
    former = state(tmp_path)
    for _ in range(3):
        Checkpoints(tmp_path, "afresh")
    (tmp_path / "checkpoints").rename(tmp_path / "new")
    (tmp_path / "checkpoints.old").rename(tmp_path / "checkpoints")
    assert same(state(tmp_path), former)


def test_a_new_run_leaves_nothing_of_the_former_tokenizer(run, tmp_path):
    (tmp_path / "vocab.json").write_text("of another model", encoding="utf-8")
    run(tmp_path, "--max_iters=2")
    assert not (tmp_path / "vocab.json").exists() and (tmp_path / "meta.json").exists()


def test_tokens_that_the_tokenizer_does_not_know_are_refused(run, dataset, tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes((dataset / f"{split}.bin").read_bytes())
    Characters("abc").save(tmp_path)
    refused(run, tmp_path / "none", f"--dataset={tmp_path}")
    assert "below 3, its tokenizer's size, is expected" in capsys.readouterr().err
    (tmp_path / "train.bin").write_bytes(b"\0" * 1001)
    refused(run, tmp_path / "none", f"--dataset={tmp_path}")
    assert "train.bin has 1001 bytes, two a token" in capsys.readouterr().err


def test_an_interrupt_saves_and_says_how_to_go_on(run, dataset, tmp_path, monkeypatch, capsys):
    calls, read = [], train.read

    def read_and_interrupt(data, starts, *args):
        if starts.ndim == 3:  # not an evaluation's
            calls.append(starts)
            if len(calls) == 3:  # the examples of a third call, while the second is under way
                signal.raise_signal(signal.SIGINT)
        return read(data, starts, *args)

    monkeypatch.setattr(train, "read", read_and_interrupt)
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=1000"]
    assert train.main(flags) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped at iteration 20; --init_from=resume goes on"
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert state(tmp_path)[0] == 20
    monkeypatch.undo()
    run(tmp_path, "--init_from=resume", "--max_iters=25")
    assert state(tmp_path)[0] == 25


def test_help_lists_every_setting(run, tmp_path):
    printed = run(tmp_path, "--help")
    assert all(f"--{name}=" in printed for name in vars(train.Config()))
