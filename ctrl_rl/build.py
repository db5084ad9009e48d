"""From config to objects: the only module that instantiates configs."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ctrl_rl.agents.agent import Agent
from ctrl_rl.classifiers.calibration import CalibrationReport
from ctrl_rl.datasets import OfflineDataset
from ctrl_rl.envs.process import DenoisingProcess
from ctrl_rl.errors import ConfigError, CtrlError, did_you_mean
from ctrl_rl.evaluation.evaluate import EvaluationPlan
from ctrl_rl.policies import DenoisingPolicy
from ctrl_rl.pretrain import PretrainPlan
from ctrl_rl.rewards.classifier import LabelModel
from ctrl_rl.runs import Run
from ctrl_rl.learner import TrainerConfig

Config = TypeVar("Config")


def _make(config: DictConfig, /, **arguments: Any) -> Any:
    """Instantiate one node; errors of the project come through as they are."""
    try:
        built = instantiate(config, _convert_="all")
        return built(**arguments) if arguments else built
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, CtrlError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise ConfigError(" ".join(str(error).split())) from error
    except TypeError as error:
        target = config.get("_target_", "?")
        raise ConfigError(f"{target} does not fit its config: {error}") from error


def _dataclass(kind: type[Config], config: DictConfig, group: str) -> Config:
    """A settings dataclass from a config node, with unknown keys named."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ConfigError(f"unknown key '{group}.{key}'; {did_you_mean(str(key), names)}")
    return kind(**values)  # type: ignore[arg-type]


def build_device(config: DictConfig) -> torch.device:
    """The device of a run, checked to exist."""
    try:
        device = torch.device(config.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={config.device} cannot be used ({reason}); try device=cpu") from error
    return device


def build_process(config: DictConfig) -> DenoisingProcess:
    """The MDP: prior, kernel, reward and control law."""
    prior = _make(config.prior)
    kernel = _make(config.kernel, scheduler_config=prior.scheduler_config)
    process = DenoisingProcess(
        prior=prior,
        kernel=kernel,
        reward=_make(config.reward),
        guidance_strength=config.env.guidance_strength,
        control_law=_make(config.control_law),
    )
    return process.to(build_device(config))


def build_policy(config: DictConfig, process: DenoisingProcess) -> DenoisingPolicy:
    """The untrained policy; its initial weights depend on the config's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        policy: DenoisingPolicy = _make(
            config.policy,
            prior=process.prior,
            kernel=process.kernel,
            controls=process.controls,
        )
    return policy.to(process.kernel.scale.device)


def build_agent(config: DictConfig, process: DenoisingProcess) -> Agent:
    """The agent, refused where the reward has no gradient that it needs."""
    agent: Agent = _make(config.agent)
    if agent.needs_reward_gradient and not process.reward_model.differentiable:
        raise ConfigError(
            f"agent={config.choices.agent} differentiates the reward, and "
            f"{type(process.reward_model).__name__} is not differentiable; use an agent that does "
            "not need the gradient, or a differentiable reward"
        )
    return agent


def build_trainer_config(config: DictConfig) -> TrainerConfig:
    """Settings of the training loop."""
    return _dataclass(TrainerConfig, config.trainer, "trainer")


def build_evaluation_plan(config: DictConfig) -> EvaluationPlan:
    """Settings of the evaluation."""
    node = OmegaConf.masked_copy(config.evaluation, [k for k in config.evaluation if k != "heldout"])
    return _dataclass(EvaluationPlan, node, "evaluation")


def build_heldout(config: DictConfig, process: DenoisingProcess) -> Mapping[str, LabelModel]:
    """Classifiers by control that only judge; empty where a task has none."""
    heldout: dict[str, LabelModel] = {}
    for name, node in config.evaluation.heldout.items():
        if name not in process.controls:
            hint = did_you_mean(str(name), process.controls)
            raise ConfigError(f"evaluation.heldout names the unknown control '{name}'; {hint}")
        heldout[str(name)] = _make(node).to(process.kernel.scale.device)
    return heldout


def build_logger(config: DictConfig, run: Run) -> Any:
    """A TorchRL logger that writes into the run folder, or None."""
    target = config.logger["_target_"].rpartition(".")[2]
    arguments: dict[str, Any] = {"exp_name": "log", "log_dir": str(run.path)}
    if target == "WandbLogger":
        arguments = {"exp_name": config.run.name, "save_dir": str(run.path)}
    return _make(config.logger, **arguments)


def build_dataset(config: DictConfig) -> OfflineDataset:
    """The offline dataset."""
    dataset: OfflineDataset = _make(config.dataset)
    return dataset


def build_pretrain_plan(config: DictConfig) -> PretrainPlan:
    """Settings of pretraining."""
    return _dataclass(PretrainPlan, config.recipe, "recipe")


def fit_classifier(config: DictConfig) -> CalibrationReport:
    """Fit, calibrate and save the classifier of a config."""
    report: CalibrationReport = _make(
        config.classifier, dataset=build_dataset(config), out=config.out
    )
    return report
