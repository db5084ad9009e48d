"""From config to objects: a function for every part of a run."""

import math
import os
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ctrl_rl.agents.agent import Agent
from ctrl_rl.agents.plan import RolloutPlan, TaskSpec
from ctrl_rl.classifiers.calibration import CalibrationReport
from ctrl_rl.controls import check_same_labels
from ctrl_rl.data import OfflineDataset
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.errors import (
    ConfigError,
    check_choice,
    did_you_mean,
)
from ctrl_rl.evaluation.evaluate import EvaluationPlan
from ctrl_rl.evaluation.samplers import Sampler
from ctrl_rl.learning.drawing import GenerationPlan
from ctrl_rl.learning.learner import TrainerConfig
from ctrl_rl.learning.pretrain import PretrainPlan
from ctrl_rl.policies import DenoisingPolicy
from ctrl_rl.rewards.classifier import LabelModel
from ctrl_rl.runs import nodes, parts
from ctrl_rl.runs.arguments import check_value, folder_of
from ctrl_rl.runs.folder import RunPlan
from ctrl_rl.runs.parts import NONE, Makers


def _part(config: DictConfig, name: str, given: Makers, /, **added: Any) -> Any:
    """A part of the run, made of what Python gives or of its node; `added` is the program's."""
    if name in given:
        part = given[name](**added)
    else:
        parts.check_given(config, name, given)
        is_partial = config[name].get("_partial_", False)
        part = nodes.make(config[name], name, **(added if is_partial else {}))
    parts.check_kind(name, part)
    return part


def build_device(config: DictConfig) -> torch.device:
    """The device of a run, checked to exist."""
    check_value(config.device, str, "device")
    try:
        device = torch.device(config.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device={config.device} cannot be used ({reason}); try device=cpu"
        ) from error
    return device


def set_up_process(config: DictConfig) -> None:
    """Give torch the config's number of CPU threads, for the whole program.

    Raises:
        ConfigError: not a number of threads, or the program was started as one of several.
    """
    several = os.environ.get("WORLD_SIZE", "1")
    if several != "1":
        raise ConfigError(
            f"WORLD_SIZE={several}: started as one of several processes, and training over several "
            "is not there yet; they would do the same work and write into one folder. Start one "
            "process, or ctrl-rl benchmark launcher=joblib for a grid"
        )
    check_value(config.threads, int, "threads")
    if config.threads < 1:
        raise ConfigError(f"threads={config.threads} must be 1 or more")
    torch.set_num_threads(config.threads)


def build_compile_backend(config: DictConfig) -> str | None:
    """The backend with which `torch.compile` compiles networks, or None."""
    backend = config.get("compile")  # older runs do not have it
    if backend is None:
        return None
    check_value(backend, str, "compile")
    check_choice("compile", backend, torch.compiler.list_backends(exclude_tags=()))
    if "isolate_recompiles" not in signature(torch.compile).parameters:
        raise ConfigError(
            f"compile={backend} needs torch 2.13 or newer, and this is {torch.__version__}; use "
            "compile=null"
        )
    return str(backend)


def build_process(config: DictConfig, given: Makers = NONE) -> DenoisingProcess:
    """The MDP: prior, kernel, reward and control law."""
    device = build_device(config)
    check_value(config.env.guidance_strength, float, "env.guidance_strength")
    prior = _part(config, "prior", given)
    kernel = _part(config, "kernel", given, scheduler_config=prior.scheduler_config)
    if "kernel" in given:
        parts.check_kernel(prior, kernel)
    process = DenoisingProcess(
        prior=prior,
        kernel=kernel,
        reward=_part(config, "reward", given),
        guidance_strength=config.env.guidance_strength,
        control_law=_part(config, "control_law", given),
    )
    return process.to(device)


def build_env(config: DictConfig, process: DenoisingProcess) -> LatentEnv:
    """The TorchRL env of training: as many episodes as an update has."""
    size, device = config.trainer.batch_size, process.kernel.scale.device
    return LatentEnv(process, num_envs=size, seed=check_seed(config.seed), device=device)


def check_seed(seed: Any, where: str = "seed") -> int:
    """The seed, checked to suit a generator."""
    check_value(seed, int, where)
    if not 0 <= seed < 2**63:
        raise ConfigError(f"{where}={seed} must be 0 or more, and less than 2^63")
    return int(seed)


def build_policy(
    config: DictConfig, process: DenoisingProcess, given: Makers = NONE
) -> DenoisingPolicy:
    """The untrained policy; its initial weights depend on the config's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(check_seed(config.seed))
        policy: DenoisingPolicy = _part(
            config,
            "policy",
            given,
            prior=process.prior,
            kernel=process.kernel,
            controls=process.controls,
        )
        parts.check_policy(policy, process.kernel)
        policy = _guided(config, process, policy)
    return policy.to(process.kernel.scale.device)


def _guided(
    config: DictConfig, process: DenoisingProcess, policy: DenoisingPolicy
) -> DenoisingPolicy:
    """The policy with the config's guidance, if there is any."""
    if config.get("guidance") is None:  # older runs do not have it
        return policy
    value = process.value_of_clean if process.reward_model.differentiable else None
    guided: DenoisingPolicy = nodes.make(config.guidance, "guidance", policy=policy, value=value)
    return guided


def build_agent(config: DictConfig, process: DenoisingProcess, given: Makers = NONE) -> Agent:
    """The agent, refused if it needs a gradient that the reward lacks.

    An agent with its own networks is a `_partial_` node and gets a `TaskSpec` as `task`.
    """
    task = TaskSpec(
        shape=process.shape, num_steps=process.num_steps, controls=process.conditions.controls
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(check_seed(config.seed))
        agent: Agent = _part(config, "agent", given, task=task)
    for phase in agent.phases.values():
        if not isinstance(getattr(phase, "plan", None), RolloutPlan):
            raise ConfigError(
                f"{type(phase).__name__} has no plan, which says what its rollouts keep; for "
                "example plan = RolloutPlan(gradients='score'), see ctrl_rl.agents.plan"
            )
    numbers = [name for name, control in process.controls.items() if math.isinf(control.size)]
    if agent.needs_equal_conditions and numbers:
        raise ConfigError(
            f"agent={config.choices.agent} compares episodes of the same condition, and no two "
            f"have the same one where a control is a number, as {numbers[0]} is; use agent=ctrl, "
            "adjoint, reinforce, ppo or tb"
        )
    if agent.needs_reward_gradient and not process.reward_model.differentiable:
        raise ConfigError(
            f"agent={config.choices.agent} differentiates the reward, and "
            f"reward={config.choices.reward} is not differentiable; use an agent that does "
            "not need the gradient, or a differentiable reward"
        )
    return agent.to(process.kernel.scale.device)


def build_method(config: DictConfig, process: DenoisingProcess) -> Sampler:
    """The sampler of a method without training."""
    method: Sampler = nodes.make(config.method, "method", process=process)
    return method


def build_run_plan(config: DictConfig) -> RunPlan:
    """Where the run goes."""
    return nodes.settings(RunPlan, config.run, "run")


def build_trainer_config(config: DictConfig) -> TrainerConfig:
    """Settings of the training loop."""
    return nodes.settings(TrainerConfig, config.trainer, "trainer")


def build_evaluation_plan(config: DictConfig) -> EvaluationPlan:
    """Settings of the evaluation."""
    node = OmegaConf.masked_copy(
        config.evaluation, [k for k in config.evaluation if k != "heldout"]
    )
    return nodes.settings(EvaluationPlan, node, "evaluation")


def build_heldout(config: DictConfig, process: DenoisingProcess) -> Mapping[str, LabelModel]:
    """Classifiers by control that only judge; empty if a task has none."""
    heldout: dict[str, LabelModel] = {}
    for name in nodes.keys_of(config.evaluation.heldout, "evaluation.heldout"):
        if name not in process.controls:
            hint = did_you_mean(str(name), process.controls)
            raise ConfigError(f"evaluation.heldout names the unknown control '{name}'; {hint}")
        model = nodes.make(config.evaluation.heldout[name], f"evaluation.heldout.{name}")
        check_same_labels(
            f"evaluation.heldout.{name}",
            getattr(model, "label_names", ()) or getattr(model, "num_labels", None),
            process.controls[str(name)],
        )
        heldout[str(name)] = model.to(process.kernel.scale.device)
    return heldout


def build_logger(config: DictConfig) -> Any:
    """What opens the logger of a run's folder, see `ctrl_rl.runs.loggers`."""
    return nodes.make(config.logger, "logger")


def build_dataset(config: DictConfig) -> OfflineDataset:
    """The offline dataset."""
    dataset: OfflineDataset = nodes.make(config.dataset, "dataset")
    return dataset


def check_unused(config: DictConfig) -> None:
    """Refuse settings of training and evaluation that no run could have, where none is made."""
    build_trainer_config(config)
    build_evaluation_plan(config)


def build_generation_plan(config: DictConfig) -> GenerationPlan:
    """How many pictures to draw."""
    check_unused(config)
    for name in ("n", "batch_size"):
        check_value(config[name], int, name)
    return GenerationPlan(n=config.n, batch_size=config.batch_size, seed=check_seed(config.seed))


def build_pretrain_plan(config: DictConfig) -> PretrainPlan:
    """Settings of pretraining."""
    return nodes.settings(PretrainPlan, config.recipe, "recipe")


def fit_classifier(config: DictConfig, dataset: OfflineDataset) -> CalibrationReport:
    """Fit, calibrate and save the classifier of a config."""
    out = folder_of(config.out, "out")
    report: CalibrationReport = nodes.make(
        config.classifier, "classifier", dataset=dataset, out=out
    )
    return report
