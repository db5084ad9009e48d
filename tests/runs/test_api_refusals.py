"""What `ctrl_rl.train` and `load_run` refuse, in one line and before a folder is made."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from own_parts import (
    SCHEDULER,
    STEPS,
    own,
    ready,
)
from running import train

import ctrl_rl
from ctrl_rl import load_run
from ctrl_rl.agents.ctrl import Ctrl
from ctrl_rl.errors import ConfigError
from ctrl_rl.kernels import ddpm_kernel
from ctrl_rl.policies import DriftPolicy
from ctrl_rl.priors import NetworkDenoiser, Prior


class Blank(torch.nn.Module):
    def forward(self, x, timestep, embedding):
        return x


OTHER = {**SCHEDULER, "beta_schedule": "squaredcos_cap_v2"}
OTHER_PRIOR = Prior(NetworkDenoiser(Blank(), OTHER), OTHER, shape=(2,))
FOR_OTHER = STEPS(scheduler_config=OTHER)


def wrong_shape(sample, control):
    return sample


def one_argument(sample):
    return sample


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"task": "gausian"}, "unknown env 'gausian'; did you mean 'gaussian'?"),
        ({"agent": "ctlr"}, "unknown agent 'ctlr'; did you mean 'ctrl'?"),
        ({"prior": None}, r"no task and no prior; name a task, such as train\('faces'\)"),
        ({"reward": None}, "no task and no reward"),
        ({"prior": Blank()}, r"prior=Blank is no Prior; .*Prior\(NetworkDenoiser\(network"),
        ({"prior": Blank}, "prior=Blank is no Prior"),
        ({"prior": lambda: Blank()}, "prior=Blank is no Prior"),
        ({"agent": DriftPolicy}, "agent=DriftPolicy is no Agent"),
        ({"agent": 3}, "agent=int is no Agent"),
        ({"policy": Ctrl()}, "policy=Ctrl is no DenoisingPolicy"),
        ({"policy": partial(DriftPolicy, widht=3)}, "policy.widht'; did you mean 'policy.width'"),
        ({"policy": partial(DriftPolicy, width=0)}, "policy.width=0 must be 1 or more"),
        ({"kernel": ddpm_kernel}, "no value for kernel.num_steps"),
        ({"kernel": FOR_OTHER}, "kernel has other noise levels than the prior's scheduler"),
        ({"kernel": STEPS(scheduler_config=SCHEDULER), "prior": OTHER_PRIOR}, "other noise levels"),
        (
            {"policy": ready()["policy"], "kernel": partial(ddpm_kernel, num_steps=9)},
            "another kern",
        ),
        ({"reward": wrong_shape}, r"function wrong_shape gave torch.float32 of shape \(16, 2\)"),
        ({"reward": one_argument}, r"reward=one_argument must take \(sample, control\)"),
        ({"reward": Blank}, "reward=Blank is no Reward"),
        ({"reward": 3}, "reward=int is no Reward; a function of"),
        ({"reward": lambda s, c: s[:, 0].detach()}, "say differentiable=false, and use an agent"),
        (
            {"controls": {"a": 2}},
            r"controls=\{'a': 2\} is for a reward function, and the reward is Lin",
        ),
        ({"reward": wrong_shape, "controls": {"a": 0}}, "controls.a=0 is no control"),
        ({"overrides": ["agent.clip=0.1"]}, "agent.clip=0.1 changes a yaml, and agent is Ctrl"),
        ({"overrides": ["seed=1"], "seed": 0}, "seed=1 in overrides and seed=0; give one"),
        ({"overrides": ["run.name=r"], "name": "q"}, "run.name=r in overrides and run.name=q"),
        ({"resume": True, "overwrite": True}, "give one"),
        ({"config_dirs": ["nowhere"]}, "nowhere is not a folder"),
        ({"updates": 0}, "trainer.updates=0 must be 1 or more"),
        ({"name": "a/b"}, "run.name=a/b is not the name of one folder"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_folder_is_made(
    given: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ctrl_rl.errors.CtrlError, match=says) as caught:
        own(tmp_path, **given)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_parts_given_to_a_loaded_run_are_checked(tmp_path: Path) -> None:
    run = train(tmp_path)
    with pytest.raises(ConfigError, match="prior='digits' is no Prior"):
        load_run(run, prior="digits")
    with pytest.raises(ConfigError, match="is a function, and the run's is not; give a Reward"):
        load_run(run, reward=lambda sample, control: sample)


def test_the_command_line_refuses_what_only_python_can_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ctrl_rl.cli.main import main

    run = own(tmp_path, updates=1, **ready())
    for words in (["sample", f"run={run.run.path}"], ["train", f"resume={run.run.path}"]):
        capsys.readouterr()
        assert main(words) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "given in Python" in told and "resume=True" in told
