"""What holds for every yaml of a group, a new one included.

A yaml is tried on the first task that uses it, or on the mixture where none does. Values that a
yaml leaves open (`???`) are given in `OPEN`.
"""

import inspect
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import choices
from contract_tasks import (
    GIVEN,
    GROUPS,
    K,
    config_of,
    permuted,
    samples,
    some_values,
    words_of_task,
)
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from ctrl_rl import keys
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.controls import Categorical
from ctrl_rl.envs.control_laws import ControlLaw
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.registration import TASKS
from ctrl_rl.envs.rollout import check_invariants, rollout
from ctrl_rl.kernels import TransitionKernel
from ctrl_rl.policies import DenoisingPolicy
from ctrl_rl.priors import Prior
from ctrl_rl.rewards import Reward
from ctrl_rl.runs.build import (
    build_agent,
    build_evaluation_plan,
    build_policy,
    build_process,
    build_trainer_config,
)
from ctrl_rl.runs.compose import compose, files

# --- all groups -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in GROUPS for name in choices(group)]
)
def test_yaml_agrees_with_the_signature(group: str, name: str) -> None:
    text = files(group)[name].read_text()
    assert text.startswith("# "), "the first line says what it is"
    node = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    assert isinstance(node, dict)
    parameters = inspect.signature(get_object(node["_target_"])).parameters
    values = {str(key): value for key, value in node.items() if not str(key).startswith("_")}
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters.values())
    settings = set(parameters) - GIVEN.get(group, set())
    optional = {key for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
    if group in ("prior", "reward"):  # their yamls are examples; the others show every setting
        assert settings - optional <= set(values) <= settings
    else:
        assert set(values) == settings
    for key, value in values.items():
        default = parameters[key].default
        open_or_nested = value == "???" or isinstance(value, dict | list)
        if default is not inspect.Parameter.empty and not open_or_nested:
            assert value == default, f"{group}/{name}.yaml has {key}={value}, the code {default}"


# --- env --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", choices("env"))
def test_env(name: str, made: Callable[[str], Path]) -> None:
    config = compose("train", [f"env={name}", *words_of_task(name, made)])
    assert config.env.name == name
    assert set(config.env) == {"name", "guidance_strength", "control_scale"}
    (env_id,) = [key for key, task in TASKS.items() if task == name]
    assert f"Gymnasium id: {env_id}." in files("env")[name].read_text()
    process = build_process(config)
    assert process.num_steps == config.kernel.num_steps
    policy = build_policy(config, process)
    plan = RolloutPlan(gradients="pathwise" if process.reward_model.differentiable else None)
    episode = rollout(LatentEnv(process, num_envs=2), policy, plan=plan)
    check_invariants(episode, plan)
    for key, value in episode.detach().items(True, True):
        assert torch.isfinite(value).all(), key


# --- experiment and settings -------------------------------------------------------------------


@pytest.mark.parametrize("name", choices("experiment"))
def test_experiment(name: str) -> None:
    """Everything that a run is made of can be built, for the number of updates that it says."""
    config = compose("train", [f"experiment={name}"])
    assert config.run.name == name
    process = build_process(config)
    build_policy(config, process)
    build_agent(config, process)
    build_trainer_config(config)
    build_evaluation_plan(config)


@pytest.mark.parametrize("name", choices("settings"))
def test_settings(name: str) -> None:
    """Every agent that a benchmark's settings name takes the words that they have for it."""
    node = OmegaConf.to_container(OmegaConf.load(files("settings")[name]))
    assert isinstance(node, dict) and set(node) <= set(choices("agent"))
    for agent, words in node.items():
        config = compose("train", ["env=digits", f"agent={agent}", *words])
        build_trainer_config(config)


# --- prior ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", choices("prior"))
def test_prior(name: str, made: Callable[[str], Path]) -> None:
    node = config_of("prior", name, made).prior
    prior = instantiate(node, _convert_="all")
    assert isinstance(prior, Prior)
    prior.train()
    x = torch.randn(6, *prior.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    timestep = torch.tensor([0, 10, 300, 500, 700, 999])
    prompt = torch.tensor([0, 1, 1, 0, 1, 2]) if prior.prompts else None
    denoised = prior.denoiser(x, timestep, prompt=prompt)
    assert denoised.shape == x.shape and denoised.dtype == torch.float32
    assert torch.isfinite(denoised).all()
    order = permuted(6)
    moved = prior.denoiser(
        x[order], timestep[order], prompt=None if prompt is None else prompt[order]
    )
    torch.testing.assert_close(moved, denoised[order], rtol=1e-4, atol=1e-4)
    sample = prior.decode(denoised)
    assert len(sample) == 6 and sample.dtype == torch.float32
    sample.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and (x.grad != 0).any()
    assert all(p.grad is None and not p.requires_grad for p in prior.parameters())
    assert not any(module.training for module in prior.modules())
    if features := prior.denoiser.embedding_features:
        nothing = torch.zeros(6, features)
        assert torch.equal(prior.denoiser(x, timestep, nothing, prompt), denoised)
        something = torch.ones(6, features)
        assert not torch.equal(prior.denoiser(x, timestep, something, prompt), denoised)


# --- kernel -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", choices("kernel"))
def test_kernel(name: str) -> None:
    process = build_process(config_of("kernel", name))
    kernel = process.kernel
    assert isinstance(kernel, TransitionKernel)
    assert kernel.num_steps == K and (kernel.scale[:K] > 0).all()
    assert len(kernel.timesteps) == K + kernel.has_read_out
    assert (kernel.timesteps.diff() < 0).all()  # noisiest first
    assert (kernel.signal.diff() > 0).all() and (kernel.noise.diff() < 0).all()
    n = len(kernel.timesteps)
    step = torch.arange(n)
    x = torch.randn(n, *process.shape, dtype=torch.bfloat16)
    denoised = torch.randn(n, *process.shape, dtype=torch.bfloat16).requires_grad_()
    mean = kernel.mean(x, denoised, step)
    assert mean.dtype == torch.float32 and mean.shape == x.shape
    (gradient,) = torch.autograd.grad(mean.sum(), denoised)
    assert (gradient != 0).any()
    # Steps of a batch do not mix.
    one = [kernel.mean(x[[k]], denoised[[k]], step[[k]]) for k in range(n)]
    assert torch.equal(torch.cat(one), mean)
    # A latent on the way to a known clean sample stays on the way: the mean of the next latent,
    # over the noise, is signal[k + 1] times the sample.
    clean = torch.full((K - 1, *process.shape), 0.5)
    along = kernel.signal[: K - 1, None] * clean
    after = kernel.signal[1:K, None] * clean
    if kernel.clip is None:
        torch.testing.assert_close(
            kernel.mean(along, clean, step[: K - 1]), after, rtol=2e-2, atol=2e-2
        )


# --- reward -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", choices("reward"))
def test_reward(name: str, made: Callable[[str], Path]) -> None:
    process = build_process(config_of("reward", name, made))
    reward = process.reward_model
    assert isinstance(reward, Reward)
    process.train()
    assert not any(module.training for module in reward.modules())
    n = 24
    sample = samples(process, n).requires_grad_(reward.differentiable)
    control = some_values(process, n)
    value = reward(sample, control)
    assert value.shape == (n,) and value.dtype == torch.float32
    assert torch.isfinite(value).all() and value.std() > 0
    if reward.upper_bound is not None:
        assert (value <= reward.upper_bound).all()
    order = permuted(n)
    moved = reward(sample[order], {key: label[order] for key, label in control.items()})
    torch.testing.assert_close(moved, value[order], rtol=1e-4, atol=1e-5)
    null = process.check_control({}, n)
    assert (reward(sample, null) == 0).all()
    assert value.requires_grad == reward.differentiable
    if reward.differentiable:
        (gradient,) = torch.autograd.grad(value.sum(), sample)
        assert torch.isfinite(gradient).all() and (gradient != 0).any()
    assert not any(p.requires_grad for p in reward.parameters())
    predicted = reward.predict(sample.detach())
    for key, label in (predicted or {}).items():
        asked = reward.controls[key]
        assert label.shape == (n,) and label.dtype == asked.dtype
        assert math.isinf(asked.size) or ((0 <= label) & (label < asked.size)).all()


# --- control law ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", choices("control_law"))
def test_control_law(name: str) -> None:
    law = build_process(config_of("control_law", name)).control_law
    assert isinstance(law, ControlLaw)
    for n in (1, 7, 256):
        label = law.draw(n, Categorical.of(4), torch.Generator().manual_seed(n))
        assert label.shape == (n,) and label.dtype == torch.int64
        assert (0 <= label).all() and (label < 4).all()
        assert torch.equal(law.draw(n, Categorical.of(4), torch.Generator().manual_seed(n)), label)


# --- policy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", choices("policy"))
def test_policy(name: str) -> None:
    config = config_of("policy", name)
    process = build_process(config)
    policy = build_policy(config, process)
    assert isinstance(policy, DenoisingPolicy)
    policy.train()
    env = LatentEnv(process, num_envs=8)
    plan = RolloutPlan(gradients="pathwise")
    episode = rollout(env, policy, plan=plan)
    check_invariants(episode, plan)
    assert torch.equal(episode[keys.LOC], episode[keys.PRIOR_LOC])
    assert torch.equal(episode[keys.SCALE][0], process.kernel.scale[:K])

    groups = policy.parameter_groups()
    assert set(groups) <= set(build_trainer_config(config).learning_rate)
    grouped = [parameter for group in groups.values() for parameter in group]
    assert len({id(p) for p in grouped}) == len(grouped)  # each learns at one rate
    assert {id(p) for p in grouped} == {id(p) for p in policy.parameters() if p.requires_grad}
    episode[keys.ACTION].sum().backward()
    assert any(p.grad is not None and (p.grad != 0).any() for p in grouped)
    theirs = {id(p) for p in grouped}  # adapters lie in the prior's network
    assert all(p.grad is None for p in process.parameters() if id(p) not in theirs)

    torch.optim.SGD(grouped, lr=1e-2).step()
    copy = build_policy(config, process)
    copy.load_state_dict(policy.state_dict())
    with torch.no_grad():
        results = []
        for each in (policy, copy):
            env.set_seed(0)
            results.append(rollout(env, each))
    assert torch.equal(results[0][keys.LOC], results[1][keys.LOC])
    assert (results[0][keys.KL].sum(1) > 0).all()
