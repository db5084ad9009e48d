"""Public Python: environments of tasks, by the names of their yamls."""

from collections.abc import Sequence
from pathlib import Path

from gymnasium.vector import AutoresetMode
from omegaconf import DictConfig

from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.control import ControlEnv, ControlVectorEnv
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.runs import build
from ctrl_rl.runs.compose import compose


def make_process(
    task: str, overrides: Sequence[str] = (), config_dirs: Sequence[str | Path] = ()
) -> DenoisingProcess:
    """The MDP of a task, such as "digits"."""
    return build.build_process(_composed(task, overrides, config_dirs))


def make_env(
    task: str,
    *,
    num_envs: int = 64,
    seed: int | None = None,
    overrides: Sequence[str] = (),
    config_dirs: Sequence[str | Path] = (),
) -> LatentEnv:
    """The TorchRL env of a task.

    Args:
        task: name of a yaml in `configs/env`, such as "digits", or in a config folder of yours.
        num_envs: batch size.
        seed: of the env's generator; None takes a fresh one.
        overrides: Hydra overrides, such as ``["kernel.num_steps=20"]``.
        config_dirs: your folders with config groups, as `--config-dir` takes them.
    """
    process = make_process(task, overrides, config_dirs)
    return LatentEnv(process, num_envs=num_envs, seed=seed, device=process.kernel.scale.device)


def make_control_env(
    task: str,
    *,
    overrides: Sequence[str] = (),
    config_dirs: Sequence[str | Path] = (),
    render_mode: str | None = None,
) -> ControlEnv:
    """Entry point of `gymnasium.make`; see `ControlEnv`, and `make_env` for what makes the task."""
    config = _composed(task, overrides, config_dirs)
    process, scale = build.build_process(config), config.env.control_scale
    return ControlEnv(process, control_scale=scale, render_mode=render_mode)


# Where `gymnasium.make` looks for what it can make of frames: a list of them, or a window.
make_control_env.metadata = ControlEnv.metadata  # type: ignore[attr-defined]


def make_control_vector_env(
    task: str,
    *,
    num_envs: int,
    overrides: Sequence[str] = (),
    config_dirs: Sequence[str | Path] = (),
    autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    render_mode: str | None = None,
) -> ControlVectorEnv:
    """Entry point of `gymnasium.make_vec`; see `ControlVectorEnv`, and `make_env` for the task."""
    config = _composed(task, overrides, config_dirs)
    return ControlVectorEnv(
        build.build_process(config),
        num_envs=num_envs,
        control_scale=config.env.control_scale,
        autoreset_mode=autoreset_mode,
        render_mode=render_mode,
    )


def _composed(task: str, overrides: Sequence[str], config_dirs: Sequence[str | Path]) -> DictConfig:
    return compose("train", [f"env={task}", *overrides], [str(each) for each in config_dirs])
