"""`ctrl_rl.train`: the command line's bits, with names or objects; loading and resuming."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from own_parts import (
    GAUSSIAN,
    OVERRIDES,
    RATES,
    own,
    ready,
)
from running import contents, interrupt, train
from torchrl.objectives import SACLoss, SoftUpdate

import ctrl_rl
from ctrl_rl import load_run
from ctrl_rl.agents.ctrl import Ctrl
from ctrl_rl.agents.parts.critics import ValueNetwork
from ctrl_rl.agents.ppo import Ppo
from ctrl_rl.agents.sac import Sac
from ctrl_rl.envs.control_laws import FixedLaw
from ctrl_rl.errors import ConfigError, RunError
from ctrl_rl.interrupts import Interrupted
from ctrl_rl.policies import DriftPolicy
from ctrl_rl.priors import diffusers_unet_prior
from ctrl_rl.rewards import FunctionReward


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by the command line."""
    return train(tmp_path_factory.mktemp("named"))


def test_a_task_by_its_name_is_the_command_lines_run(named: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run = ctrl_rl.train(
            "gaussian",
            agent="ctrl",
            updates=12,
            seed=0,
            overrides=OVERRIDES,
            root=tmp_path,
            name="r",
            quiet=True,
        )
        assert torch.get_num_threads() == 2, "a library leaves the program's threads alone"
    finally:
        torch.set_num_threads(threads)
    assert contents(run.run.path) == contents(named) and run.run.path == tmp_path / "r"
    assert run.summary["gap_nats"] == load_run(named).summary["gap_nats"]


def test_parts_made_in_python_are_those_of_the_yamls(named: Path, tmp_path: Path) -> None:
    parts = ready()
    before = {key: value.clone() for key, value in parts["policy"].state_dict().items()}
    runs = {
        "makers": own(tmp_path, name="makers"),
        "objects": own(tmp_path, name="objects", **parts),
        "lambdas": own(
            tmp_path,
            name="lambdas",
            prior=lambda: GAUSSIAN(),
            policy=lambda prior, kernel, controls: DriftPolicy(
                prior=prior, kernel=kernel, controls=controls
            ),
            agent=lambda: Ctrl(),
        ),
    }
    for name, run in runs.items():
        assert contents(run.run.path) == contents(named), name
    assert all(torch.equal(parts["policy"].state_dict()[key], before[key]) for key in before)
    samples = runs["makers"].sample(0, n=3)
    assert torch.equal(load_run(tmp_path / "makers").sample(0, n=3), samples)  # all is recorded
    node = load_run(tmp_path / "makers").config.agent
    assert node == {"_target_": "ctrl_rl.agents.ctrl.Ctrl"}
    with pytest.raises(RunError, match=r"policy \(DriftPolicy\).*load_run\(path, .*prior=…"):
        load_run(tmp_path / "objects")
    parts.pop("agent")  # not needed to sample
    assert torch.equal(
        load_run(tmp_path / "objects", **ready_without_agent()).sample(0, 3), samples
    )
    with pytest.raises(RunError, match=r"prior \(lambda\) of this run was given in Python"):
        load_run(tmp_path / "lambdas", policy=parts["policy"])


def ready_without_agent() -> dict[str, Any]:
    return {name: part for name, part in ready().items() if name != "agent"}


MODULE = """
def near(sample, control):
    return -2 * (sample[:, 0] - control["place"]).square()
"""
PLACES = {"place": {"low": -1.0, "high": 1.5}}


def test_a_reward_function_of_a_module_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_places.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import my_own_places

    few = {"updates": 2, "root": tmp_path, "quiet": True}
    few |= {"overrides": [*OVERRIDES, "evaluation.most_conditions=2"]}
    run = ctrl_rl.train("gaussian", reward=my_own_places.near, controls=PLACES, **few)
    assert run.config.reward == {
        "_target_": "ctrl_rl.rewards.FunctionReward",
        "function": "my_own_places.near",
        "controls": PLACES,
        "differentiable": True,
        "upper_bound": None,
    }
    with pytest.raises(RunError, match="trust=my_own_places"):
        load_run(run.run.path)
    samples = run.sample(1.0, n=3)
    assert torch.equal(load_run(run.run.path, trust="my_own_places").sample(1.0, n=3), samples)
    # One that nothing can import is given again, without its controls.
    code = {"near": None}
    exec(MODULE, code)
    given = ctrl_rl.train("gaussian", reward=code["near"], controls=PLACES, name="given", **few)
    assert contents(given.run.path) == contents(run.run.path)
    with pytest.raises(RunError, match=r"reward \(near\) .* load_run\(path, reward=…\)"):
        load_run(given.run.path)
    again = load_run(given.run.path, reward=code["near"])
    assert torch.equal(again.sample(1.0, n=3), samples)
    assert again.evaluate().summary["gap_nats"] == given.summary["gap_nats"]


def test_a_run_without_controls_samples_without_one(tmp_path: Path) -> None:
    run = own(tmp_path, reward=lambda sample, control: -sample.square().sum(1), updates=1)
    assert run.sample(n=3).shape == (3, 2)
    for control in (1, [1, 2, 3]):
        with pytest.raises(ConfigError, match="this run has no control; sample without one"):
            run.sample(control, n=3)


def test_values_of_several_controls_are_given_by_name(tmp_path: Path) -> None:
    controls = {"hat": ["no", "yes"], "level": {"low": 0, "high": 1}}
    few = [*OVERRIDES, *RATES, "evaluation.most_conditions=2"]
    run = own(
        tmp_path,
        reward=lambda s, c: s[:, 0] * c["level"],
        controls=controls,
        overrides=few,
        updates=1,
    )
    says = r"controls hat \(no, yes\), level .*such as control=\{'hat': 'yes', 'level': '0.5'\}"
    with pytest.raises(ConfigError, match=says):
        run.sample("yes", n=3)
    assert run.sample({"hat": "yes", "level": "0.5"}, n=3).shape == (3, 2)


def test_a_relative_path_of_a_part_is_recorded_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").symlink_to(Path(ctrl_rl.__file__).parent / "assets" / "digits" / "prior")
    monkeypatch.chdir(tmp_path)
    run = ctrl_rl.train(
        "digits",
        prior=partial(diffusers_unet_prior, path=Path("mine")),
        updates=1,
        quiet=True,
        overrides=[*OVERRIDES, "kernel.num_steps=2"],
    )
    assert run.config.prior.path == str(tmp_path / "mine")
    monkeypatch.chdir("/")
    again = load_run(tmp_path / "runs" / "digits-ctrl-s0")
    assert torch.equal(again.sample(3, n=2), run.sample(3, n=2))


class Stops(Ctrl):
    """Ctrl-C in the third update."""

    calls = 0

    def loss(self, rollout):
        Stops.calls += 1
        if Stops.calls == 4:  # the first call is the trial before training
            raise KeyboardInterrupt
        return super().loss(rollout)


def test_an_interruption_says_how_to_go_on(named: Path, tmp_path: Path) -> None:
    call = partial(own, tmp_path, name="r", prior=GAUSSIAN(), agent=Stops)
    with pytest.raises(Interrupted, match="the same call of ctrl_rl.train and resume=True"):
        call()
    assert contents(call(resume=True).run.path) == contents(named)


def test_a_network_as_the_reward_function_is_not_trained() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Dropout(0.5))
    FunctionReward(function=network, controls={}, differentiable=True)
    assert not network.training and not any(p.requires_grad for p in network.parameters())


SAC = partial(
    Sac,
    critic=partial(ValueNetwork, width=8),
    objective=SACLoss,
    target_update=SoftUpdate,
)


@pytest.mark.parametrize(
    "agent",
    [
        partial(Ppo, clip=0.2),
        SAC,
        lambda task: Ppo(task=task, clip=0.2),
    ],
    ids=["recorded", "nested", "lambda"],
)
def test_an_agent_that_needs_the_task(agent: Any, tmp_path: Path) -> None:
    run = own(tmp_path, agent=agent, updates=2, name="whole", overrides=[*OVERRIDES, *RATES])
    assert load_run(run.run.path).update == 2
    node = run.config.agent
    assert node == {} or node["_partial_"] is True
    part = own(tmp_path, agent=agent, updates=2, name="part")
    interrupt(part.run.path)
    resumed = own(tmp_path, agent=agent, updates=2, name="part", resume=True)
    assert contents(resumed.run.path) == contents(run.run.path)


def test_the_same_call_resumes(named: Path, tmp_path: Path) -> None:
    parts = ready()
    call = partial(own, tmp_path, name="r", **parts)
    run = call(resume=True)  # there is none yet
    interrupt(run.run.path)
    with pytest.raises(RunError, match="exists; resume=True goes on with it, overwrite=True"):
        call()
    with pytest.raises(RunError, match=r"trained with trainer.updates=12 instead of 13"):
        call(resume=True, updates=13)
    with pytest.raises(RunError, match=r"trained with given.agent=Ctrl instead of \(missing\)"):
        call(resume=True, agent=Ctrl)
    call(resume=True)
    assert contents(run.run.path) == contents(named)
    written = (run.run.path / "summary.json").stat().st_mtime_ns
    assert call(resume=True).update == 12
    assert (run.run.path / "summary.json").stat().st_mtime_ns == written, "a finished one is loaded"
    for each in (run.run.path / "checkpoints").iterdir():  # killed before its first checkpoint
        for file in each.iterdir():
            file.unlink()
        each.rmdir()
    (run.run.path / "summary.json").unlink()
    assert contents(call(resume=True).run.path) == contents(named)


def test_a_task_with_a_part_of_ones_own(tmp_path: Path) -> None:
    run = ctrl_rl.train(
        "digits",
        reward=lambda sample, control: -sample.square().mean(dim=(1, 2, 3)),
        control_law=FixedLaw(label=0),
        agent="reinforce",
        differentiable=False,
        updates=1,
        root=tmp_path,
        quiet=True,
        overrides=[*OVERRIDES, "kernel.num_steps=2"],
    )
    assert run.config.choices.prior == "digits" and run.config.trainer.batch_size == 16
    assert run.config.evaluation.heldout == {}, "digits' judge knows no control of this reward"


def test_agents_of_ones_own_are_named_in_the_folder(tmp_path: Path) -> None:
    class Mine(Ctrl):
        pass

    assert own(tmp_path, agent=Mine, updates=1).run.path.name == "own-Mine-s0"
    more = {"overrides": [*OVERRIDES, *RATES, "run.name=other"]}
    assert own(tmp_path, agent=Mine, updates=1, **more).run.path.name == "other"
