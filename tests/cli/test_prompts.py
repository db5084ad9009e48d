"""A task on a text-to-image pipeline, from a folder of the user's own, through the command line."""

import pytest
import torch
from pipelines import FLOWS, MAKERS, SIZES
from running import contents, interrupt, metrics, summary

from ctrl_rl import load_run
from ctrl_rl.cli.main import main
from ctrl_rl.errors import ConfigError

pytest.importorskip("transformers")

REWARD = """
import torch


def brightness(sample, control):
    sign = 1 - 2 * control["level"].float()
    value = torch.nn.functional.logsigmoid(8 * sign * sample.mean(dim=(1, 2, 3)))
    return torch.where(control["level"] < 2, value, 0.0)
"""
REWARD_YAML = """
_target_: ctrl_rl.rewards.FunctionReward
function: prompted_reward.brightness
controls: {level: 2}
differentiable: true
upper_bound: 0.0
"""
ENV_YAML = """# @package _global_
defaults:
  - override /prior: diffusers
  - override /kernel: ddim
  - override /policy: low_rank
  - override /reward: brightness
env: {name: bright, guidance_strength: 1.0, control_scale: 1.0}
kernel: {num_steps: 3}
prior:
  path: PATH
  prompts: [a cat, "ein Hund 🐕"]
  evaluation_prompts: [a cat, "a very red fox"]
trainer: {batch_size: 4, checkpoint_every: 1}
evaluation: {prior_samples: 8, policy_samples: 4, exact_samples: 4}
"""


def words_for(kind, folder):
    """Words of `ctrl-rl train` on a pipeline of another kind than the yaml's."""
    words = [f"prior.path={MAKERS[kind](folder / kind)}", f"prior.size={SIZES.get(kind, 'null')}"]
    return [*words, "kernel=flow_sde"] if kind in FLOWS else words


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Words of `ctrl-rl train` for the user's task, whose files lie outside the repository."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CTRL_RL_TRUST", "prompted_reward")
    (tmp_path / "prompted_reward.py").write_text(REWARD)
    for group in ("reward", "env"):
        (tmp_path / "mine" / group).mkdir(parents=True)
    (tmp_path / "mine" / "reward" / "brightness.yaml").write_text(REWARD_YAML)
    pipeline = MAKERS["sd"](tmp_path / "pipeline")
    env = ENV_YAML.replace("PATH", str(pipeline))
    (tmp_path / "mine" / "env" / "bright.yaml").write_text(env)
    return ["env=bright", f"--config-dir={tmp_path / 'mine'}", f"run.root={tmp_path}"]


@pytest.mark.parametrize("agent", ["ctrl", "ppo"])
@pytest.mark.parametrize("kind", MAKERS)
def test_train_evaluate_sample(kind, agent, words, tmp_path, capsys):
    run = tmp_path / "run"
    given = [*words, f"agent={agent}", "run.name=run", "trainer.updates=2"]
    given += words_for(kind, tmp_path)
    assert main(["train", *given]) == 0
    figures = summary(run)
    prompts = ("a cat", "a very red fox")
    assert list(figures["per_label"]) == [f"prompt={p}, level={i}" for p in prompts for i in (0, 1)]
    assert figures["gap_nats"] > 0 and figures["prior"]["kl_nats"] == 0
    assert len(metrics(run)) == 2 and "gap_nats" not in metrics(run)[0]

    capsys.readouterr()
    word = ["sample", f"run={run}", "control.level=1", "n=2"]
    assert main([*word, "control.prompt=a very red fox"]) == 0
    (picture,) = run.glob("sample-level=1,prompt=a_very_red_fox-*-strength1-seed0.png")
    assert main([*word, f"control.prompt={'very ' * 80}"]) == 2  # unknown, whatever its length
    assert main([*word, "control.prompt=a very red fax"]) == 2
    assert "did you mean 'a very red fox'" in capsys.readouterr().err

    loaded = load_run(run)
    asked = {"prompt": "ein Hund 🐕", "level": 0}
    by_name = loaded.sample(asked, n=2)
    assert torch.equal(by_name, loaded.sample({"prompt": 1, "level": 0}, n=2))
    assert not torch.equal(by_name, loaded.sample(asked, n=2, strength=0.0))
    with pytest.raises(ConfigError, match="'dark' of control level; accepted: 0, 1, any"):
        loaded.sample({"prompt": "a cat", "level": "dark"})


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_resume_is_bitwise(kind, words, tmp_path):
    words = [*words, *words_for(kind, tmp_path)]
    assert main(["train", *words, "run.name=whole", "trainer.updates=3"]) == 0
    assert main(["train", *words, "run.name=part", "trainer.updates=3"]) == 0
    interrupt(tmp_path / "part")
    assert main(["train", f"resume={tmp_path / 'part'}"]) == 0
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
