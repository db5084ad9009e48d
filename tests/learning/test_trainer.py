"""Training: determinism, resuming, Ctrl-C, NaN, counting, schedules, averages."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from running import SMALL, contents, metrics, summary, train
from safetensors.torch import load_file

from ctrl_rl import load_run
from ctrl_rl.cli.main import main
from ctrl_rl.errors import ConfigError
from ctrl_rl.learning.learner import TrainerConfig
from ctrl_rl.runs import train as training
from ctrl_rl.runs.folder import Run

HARD = ["trainer.ema_decay=0.9", "agent.truncation=uniform"]


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C as Python has it, where the tests run as a background job that ignores it, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_one_seed_one_run(tmp_path):
    first, second = train(tmp_path, "a", *HARD), train(tmp_path, "b", *HARD)
    assert contents(first) == contents(second)
    other = train(tmp_path, "c", "seed=1", *HARD)
    assert contents(first)["policy.safetensors"] != contents(other)["policy.safetensors"]
    assert contents(first)["metrics.jsonl"] != contents(other)["metrics.jsonl"]


def test_training_does_not_depend_on_the_global_generator(tmp_path):
    torch.manual_seed(1)
    first = train(tmp_path, "a")
    torch.manual_seed(2)
    assert contents(first) == contents(train(tmp_path, "b"))


LONG = [*HARD, "trainer.updates=60", "trainer.checkpoint_every=7"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), "whole", *LONG)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed_is_uninterrupted(whole, tmp_path, number):
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "ctrl_rl", "train", *SMALL, *LONG]
    command += [f"run.root={tmp_path}", "run.name=killed"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines, wanted = 0, random.Random(int(number)).randint(1, 50)
    file = killed / "metrics.jsonl"
    while lines < wanted and process.poll() is None:
        lines = file.read_bytes().count(b"\n") if file.is_file() else 0
        time.sleep(0.001)
    process.send_signal(number)
    _, told = process.communicate()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert f"ctrl-rl train resume={killed}" in told
        assert "Traceback" not in told
        stopped = metrics(killed)[-1]["update"]
        assert (killed / "checkpoints" / f"{stopped:06d}").is_dir()
    assert not (killed / "summary.json").exists()
    assert main(["train", f"resume={killed}"]) == 0
    assert contents(killed) == contents(whole)
    assert metrics(killed)[-1]["denoiser_calls"] == 60 * 16 * (9 + 8)
    assert summary(killed)["gap_nats"] == summary(whole)["gap_nats"]


def test_a_half_written_line_and_checkpoint_are_forgotten(tmp_path):
    whole = train(tmp_path, "whole")
    run = train(tmp_path, "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"update": 13, "rew')
    (run / "checkpoints" / "000015.partial").mkdir()
    assert main(["train", f"resume={run}"]) == 0
    assert contents(run)["metrics.jsonl"] == contents(whole)["metrics.jsonl"]


def test_resuming_an_earlier_checkpoint_repeats_the_rest(tmp_path):
    run = train(tmp_path)
    before = contents(run)
    assert main(["train", f"resume={run}", "checkpoint=5"]) == 0
    assert contents(run) == before


def test_resuming_a_finished_run_evaluates_it_again(tmp_path):
    run = train(tmp_path)
    before, costs = contents(run), summary(run)
    (run / "summary.json").unlink()
    assert main(["train", f"resume={run}"]) == 0
    assert contents(run) == before
    again = summary(run)
    assert again.pop("wall_s") >= costs.pop("wall_s")
    assert again == costs


def test_ctrl_c_in_the_last_update_still_stops(tmp_path, monkeypatch, capsys):
    log = Run.log

    def log_and_interrupt(self, figures):
        log(self, figures)
        if figures["update"] == 12:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "log", log_and_interrupt)
    words = ["train", *SMALL, f"run.root={tmp_path}", "run.name=run"]
    assert main(words) == 130
    assert "ctrl-rl train resume=" in capsys.readouterr().err


@pytest.mark.parametrize("completion", ["resume", "evaluate"])
def test_ctrl_c_in_the_evaluation_loses_nothing(tmp_path, monkeypatch, capsys, completion):
    whole = train(tmp_path, "whole")

    def interrupt(*arguments, **named):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", interrupt)
        assert main(["train", *SMALL, f"run.root={tmp_path}", "run.name=run"]) == 130
    run = tmp_path / "run"
    assert f"ctrl-rl train resume={run}" in capsys.readouterr().err
    completed = ["train", f"resume={run}"] if completion == "resume" else ["evaluate", f"run={run}"]
    assert main(completed) == 0
    done, expected = summary(run), summary(whole)
    for key in expected.keys() - {"wall_s"}:
        assert done[key] == expected[key], key
    assert done["wall_s"] is not None


def test_nan_reward_stops_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    (tmp_path / "poison.py").write_text(
        "import torch\n"
        "calls = 0\n"
        "def reward(sample, control):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    bad = (control['side'] == 1) & (calls > 10) & (sample.shape[0] == 16)\n"
        "    return torch.where(bad, torch.nan, sample[:, 0])\n"
    )
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "poison.yaml").write_text(
        "_target_: ctrl_rl.rewards.FunctionReward\n"
        "function: poison.reward\ncontrols: {side: 2}\ndifferentiable: true\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["train", f"--config-dir={tmp_path}", *SMALL, f"run.root={tmp_path}", "run.name=run"]
    assert main([*words, "reward=poison"]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "side=1" in told and "nan" in told and "000005" in told
    run = tmp_path / "run"
    assert f"update {len(metrics(run)) + 1}:" in told
    assert Run.open(run).checkpoints() == [0, 5]
    assert Run.open(run).load().update == 5
    assert load_run(run, trust=["poison"]).sample(0, n=3).isfinite().all()


def test_calls_are_counted_exactly(tmp_path):
    for line in metrics(train(tmp_path)):
        assert line["denoiser_calls"] == line["update"] * 16 * (9 + 8)
        assert line["reward_calls"] == line["update"] * 16
    costs = summary(tmp_path / "run")
    assert (costs["steps"], costs["denoiser_calls"]) == (12, 12 * 16 * 17)


def test_the_average_is_evaluated(tmp_path):
    run = train(tmp_path, "run", "trainer.ema_decay=0.9", "trainer.keep_checkpoints=20",
                "trainer.checkpoint_every=1")  # fmt: skip
    weights = [load_file(folder / "policy.safetensors")
               for folder in sorted((run / "checkpoints").iterdir())]  # fmt: skip
    average = weights[1]  # the first update's weights start it
    for later in weights[2:]:
        average = {k: 0.9 * average[k] + 0.1 * later[k] for k in average}
    loaded = load_run(run)
    for name, value in loaded.policy.named_parameters():
        torch.testing.assert_close(value, average[name], rtol=1e-4, atol=1e-6)
    assert not torch.equal(value, weights[-1][name])
    again = loaded.evaluate().summary
    assert again["gap_nats"] == summary(run)["gap_nats"]


def test_schedules():
    plan = TrainerConfig(updates=100, schedule="cosine", warmup=10)
    assert plan.rate_factor(0) == pytest.approx(0.1)
    assert plan.rate_factor(50) == pytest.approx(0.5)
    assert plan.rate_factor(99) == pytest.approx(0.5 * (1 + math.cos(0.99 * math.pi)))
    assert TrainerConfig(updates=100, schedule="linear").rate_factor(75) == pytest.approx(0.25)
    assert TrainerConfig(updates=100, schedule="constant").rate_factor(99) == 1.0
    with pytest.raises(ConfigError, match="cosine"):
        TrainerConfig(schedule="cosin")


def test_schedule_and_clipping_act(tmp_path):
    still = train(tmp_path, "still", "trainer.schedule=linear", "trainer.max_grad_norm=null")
    factors = [line["learning_rate_factor"] for line in metrics(still)]
    assert factors == pytest.approx([1 - k / 12 for k in range(12)])
    assert all(line["grad_norm"] > 0 for line in metrics(still))
    clipped = train(tmp_path, "clipped", "trainer.schedule=linear", "trainer.max_grad_norm=1e-9")
    assert metrics(clipped)[0] == metrics(still)[0]
    assert metrics(clipped)[-1] != metrics(still)[-1]


def test_metrics_improve_and_hold_no_clock(tmp_path):
    run = train(tmp_path, "run", "trainer.updates=60", "trainer.batch_size=64")
    lines = metrics(run)
    assert [line["update"] for line in lines] == list(range(1, 61))
    assert not [name for name in lines[0] if "wall" in name or "time" in name]
    assert lines[0]["kl"] == 0
    assert summary(run)["gap_nats"] < 0.5 * summary(run)["prior"]["gap_nats"]
    json.dumps(lines, allow_nan=False)
