"""Training: what is claimed of resuming, of kills, of accumulation, of evaluation, of what a run leaves behind."""

import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from runs import SCRIPT, TINY, losses_of, same, start, state

from jax_nanogpt import train, weight_loader
from jax_nanogpt.checkpoint import Checkpoints
from jax_nanogpt.data.corpus import write_characters
from jax_nanogpt.model import GPT, GPTConfig, init_params
from shared.tokenizer import Characters


def refused(run, out_dir, *flags):
    with pytest.raises(SystemExit) as caught:
        run(out_dir, *flags)
    assert caught.value.code == 2


@pytest.mark.parametrize("flags", [["--optimizer=adamw"], ["--optimizer=muon", "--muon_weight_decay=0.1"]])
def test_stopped_and_resumed_equals_unbroken_to_the_bit(flags, run, tmp_path):
    run(tmp_path / "whole", "--max_iters=37", *flags)
    run(tmp_path / "parts", "--max_iters=14", *flags)
    run(tmp_path / "parts", "--max_iters=37", "--init_from=resume", *flags)
    assert same(state(tmp_path / "whole"), state(tmp_path / "parts"))
    assert losses_of(tmp_path / "whole")[37] == losses_of(tmp_path / "parts")[37]
    run(tmp_path / "other", "--max_iters=37", "--seed=1", *flags)
    assert not same(state(tmp_path / "whole"), state(tmp_path / "other"))


def kill_when(process, happened):
    while not happened():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_kill_in_training_or_in_saving_loses_only_what_came_after_the_last_checkpoint(run, dataset, tmp_path):
    flags = ("--max_iters=40", "--eval_interval=2")
    out_dir = tmp_path / "killed"
    folder = out_dir / "checkpoints"
    run(tmp_path / "whole", *flags)

    def is_saving():
        return any(folder.glob("*tmp*"))

    def is_complete(step):
        return lambda: any(int(p.name) >= step for p in folder.glob("*") if p.name.isdigit()) and not is_saving()

    kill_when(start(dataset, out_dir, *flags), is_complete(4))
    first, _ = state(out_dir)
    assert first >= 4
    kill_when(start(dataset, out_dir, *flags, "--init_from=resume"), is_saving)
    second, _ = state(out_dir)
    assert first <= second < 40
    run(out_dir, *flags, "--init_from=resume")
    assert same(state(tmp_path / "whole"), state(out_dir))
    assert losses_of(tmp_path / "whole") == losses_of(out_dir)
    assert not is_saving()


def test_best_and_last_are_kept(run, tmp_path):
    run(tmp_path, "--max_iters=20", "--eval_interval=10")
    run(tmp_path, "--max_iters=40", "--eval_interval=10", "--init_from=resume", "--learning_rate=30", "--min_lr=30")
    losses, checkpoints = losses_of(tmp_path), Checkpoints(tmp_path)
    assert checkpoints.last() == 40
    assert checkpoints.best() == min(losses, key=losses.get) == 20
    assert sorted(checkpoints.manager.all_steps()) == [20, 30, 40]  # the best and the last two


def test_a_fresh_start_puts_the_former_run_aside(run, tmp_path):
    run(tmp_path, "--max_iters=10")
    former = state(tmp_path)
    run(tmp_path, "--max_iters=5")
    assert state(tmp_path)[0] == 5
    (tmp_path / "checkpoints").rename(tmp_path / "new")
    (tmp_path / "checkpoints.old").rename(tmp_path / "checkpoints")
    assert same(state(tmp_path), former)


def test_accumulated_micro_batches_equal_one_large_batch(run, tmp_path):
    flags = ("--max_iters=5", "--dropout=0", "--learning_rate=1e-3")
    run(tmp_path / "one", *flags, "--batch_size=8", "--gradient_accumulation_steps=1")
    run(tmp_path / "four", *flags, "--batch_size=2", "--gradient_accumulation_steps=4")
    for one, four in zip(state(tmp_path / "one")[1], state(tmp_path / "four")[1], strict=True):
        np.testing.assert_allclose(one, four, atol=1e-4)


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
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=32))
    params = init_params(model.config, jax.random.key(0))
    data = np.random.default_rng(0).integers(50, size=tokens).astype(np.uint16)
    windows = [data[i : i + 17] for i in range(0, tokens - 16, 16)]
    expected = float(train.losses(model, params, np.array(windows, np.int32)).mean())
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
    run(tmp_path / "first", "--max_iters=40", "--block_size=24")
    config, params = Checkpoints(tmp_path / "first").restore_model(40)
    weight_loader.save(tmp_path / "exported", config, params, tokenizer_folder=dataset)
    run(tmp_path / "tuned", f"--init_from={tmp_path / 'exported'}", "--max_iters=20", "--schedule=constant")
    fresh, tuned = (losses_of(tmp_path / name, "train_loss") for name in ("first", "tuned"))
    assert tuned[0] < fresh[0] - 0.8 and tuned[20] < tuned[0]
    assert Checkpoints(tmp_path / "tuned").restore_model(20)[0].block_size == 16


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
    run(tmp_path, "--max_iters=10")
    with pytest.raises(SystemExit, match=r"the loss is (nan|inf) at iteration .*last good checkpoint: iteration 10 in"):
        run(tmp_path, "--max_iters=40", "--init_from=resume", "--learning_rate=1e38", "--min_lr=1e38", "--grad_clip=0")
    assert Checkpoints(tmp_path).last() == Checkpoints(tmp_path).best() == 10
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


def test_an_interrupt_saves_and_says_how_to_go_on(run, dataset, tmp_path):
    command = [sys.executable, SCRIPT, *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=100000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8")
    while not (tmp_path / "metrics.jsonl").exists() or '"iter": 20,' not in (tmp_path / "metrics.jsonl").read_text(
        encoding="utf-8"
    ):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    last, _ = state(tmp_path)
    assert last >= 20 and errors.splitlines()[-1] == f"stopped at iteration {last}; --init_from=resume goes on"
    run(tmp_path, "--init_from=resume", f"--max_iters={last + 5}")
    assert state(tmp_path)[0] == last + 5


def test_help_lists_every_setting(run, tmp_path):
    printed = run(tmp_path, "--help")
    assert all(f"--{name}=" in printed for name in vars(train.Config()))
