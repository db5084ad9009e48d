"""`ctrl_rl.train`: the command line's bits, with names or objects; loading and resuming."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from running import SMALL, contents, interrupt, train
from torchrl.objectives import SACLoss, SoftUpdate

import ctrl_rl
from ctrl_rl import load_run
from ctrl_rl.agents.ctrl import Ctrl
from ctrl_rl.agents.parts.critics import ValueNetwork
from ctrl_rl.agents.ppo import Ppo
from ctrl_rl.agents.sac import Sac
from ctrl_rl.envs.control_laws import FixedLaw
from ctrl_rl.errors import ConfigError, RunError
from ctrl_rl.kernels import ddpm_kernel
from ctrl_rl.policies import DriftPolicy
from ctrl_rl.priors import NetworkDenoiser, Prior, gaussian_prior
from ctrl_rl.rewards import FunctionReward, LinearReward
from ctrl_rl.runs.compose import compose

OVERRIDES = [word for word in SMALL if not word.startswith(("env=", "trainer.updates="))]
# The parts of env=gaussian, made in Python.
CONFIG = compose("train", ["env=gaussian"])
SCHEDULER = dict(CONFIG.prior.scheduler)
GAUSSIAN = partial(
    gaussian_prior, mean=list(CONFIG.prior.mean), std=CONFIG.prior.std, scheduler=SCHEDULER
)
LINEAR = partial(LinearReward, weights=[list(each) for each in CONFIG.reward.weights])
STEPS = partial(ddpm_kernel, num_steps=8)
RATES = [f"trainer.learning_rate={{{','.join(f'{k}: 0.01' for k in ('network', 'embedding'))}}}"]
MAKERS = {"prior": GAUSSIAN, "reward": LINEAR, "kernel": STEPS, "policy": DriftPolicy}


def own(root: Path, **named: Any) -> ctrl_rl.LoadedRun:
    given = {"agent": Ctrl, **MAKERS, "updates": 12, "overrides": [*OVERRIDES, *RATES]}
    return ctrl_rl.train(**{**given, "root": root, "quiet": True, **named})


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


def ready() -> dict[str, Any]:
    """The same parts as objects; the policy has the weights that the config's seed gives."""
    prior = GAUSSIAN()
    kernel, reward = STEPS(scheduler_config=prior.scheduler_config), LINEAR()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = DriftPolicy(prior=prior, kernel=kernel, controls=reward.controls)
    return {"prior": prior, "kernel": kernel, "reward": reward, "policy": policy, "agent": Ctrl()}


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
        (
            {"reward": wrong_shape},
            r"the reward function wrong_shape gave torch.float32 of shape \(16, 2\)",
        ),
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


def test_parts_given_to_a_loaded_run_are_checked(named: Path) -> None:
    with pytest.raises(ConfigError, match="prior='digits' is no Prior"):
        load_run(named, prior="digits")
    with pytest.raises(ConfigError, match="is a function, and the run's is not; give a Reward"):
        load_run(named, reward=lambda sample, control: sample)


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


def test_agents_of_ones_own_are_named_in_the_folder(tmp_path: Path) -> None:
    class Mine(Ctrl):
        pass

    assert own(tmp_path, agent=Mine, updates=1).run.path.name == "own-Mine-s0"
    more = {"overrides": [*OVERRIDES, *RATES, "run.name=other"]}
    assert own(tmp_path, agent=Mine, updates=1, **more).run.path.name == "other"


def test_environments_see_config_folders(tmp_path: Path) -> None:
    import gymnasium

    (tmp_path / "env").mkdir()
    text = (Path(ctrl_rl.__file__).parent / "configs" / "env" / "gaussian.yaml").read_text()
    (tmp_path / "env" / "mine.yaml").write_text(text.replace("num_steps: 8", "num_steps: 3"))
    folders = {"config_dirs": [tmp_path]}
    assert ctrl_rl.make_env("mine", num_envs=2, **folders).process.num_steps == 3
    env = gymnasium.make("ctrl_rl.envs:ctrl_rl/Gaussian-v0", task="mine", **folders)
    assert env.unwrapped.process.num_steps == 3
    name = "ctrl_rl.envs:ctrl_rl/Gaussian-v0"
    envs = gymnasium.make_vec(
        name,
        num_envs=2,
        vectorization_mode="vector_entry_point",
        vector_kwargs={},
        task="mine",
        **folders,
    )
    assert envs.process.num_steps == 3


def test_composing_inside_an_app_of_hydra(tmp_path: Path) -> None:
    import hydra

    (tmp_path / "main.yaml").write_text("a: 1\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose("train", ["env=gaussian"]).env.name == "gaussian"
        with pytest.raises(ConfigError):
            compose("train", ["trainer.udpates=1"])
        assert hydra.compose("main") == {"a": 1}
