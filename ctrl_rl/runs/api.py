"""`ctrl_rl.train`: training from Python, by names of yamls or with one's own objects."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ctrl_rl.errors import ConfigError, RunError
from ctrl_rl.rewards import Reward
from ctrl_rl.runs import build
from ctrl_rl.runs.compose import compose, stored
from ctrl_rl.runs.folder import Run
from ctrl_rl.runs.loaded import LoadedRun
from ctrl_rl.runs.parts import GIVEN, check_part, is_function, label_of, makers
from ctrl_rl.runs.record import record
from ctrl_rl.runs.resuming import difference
from ctrl_rl.runs.train import train_and_evaluate
from ctrl_rl.runs.trust import own_modules

# The task of who names none: the parts are all there is to it.
_OWN = ["~env", "+env.name=own", "+env.guidance_strength=1.0", "+env.control_scale=1.0"]


def train(
    task: str | None = None,
    *,
    agent: Any = None,
    prior: Any = None,
    kernel: Any = None,
    reward: Any = None,
    controls: Mapping[str, Any] | None = None,
    differentiable: bool | None = None,
    upper_bound: float | None = None,
    control_law: Any = None,
    policy: Any = None,
    updates: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    overrides: Sequence[str] = (),
    config_dirs: Sequence[str | Path] = (),
    name: str | None = None,
    root: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = False,
) -> LoadedRun:
    """Train an agent in a task, evaluate it, and load the run.

        run = ctrl_rl.train("faces", agent="ctrl", updates=200)

    A part is the name of a yaml, a ready object, or what makes one: a class or a function, with
    arguments by `functools.partial`. What makes one gets by name what the program adds: a kernel
    `scheduler_config`; a policy `prior`, `kernel` and `controls`; an agent `task`, if it takes it.
    Classes, functions and partials that Python can import again are recorded in the run's config;
    other parts are given again to `load_run`.

    Args:
        task: name of a yaml in `configs/env`; None for one that `prior` and `reward` make.
        agent: "ctrl" if None.
        prior: the pretrained model; None for the task's.
        kernel: the sampler's transitions; None for the task's, or "ddpm".
        reward: None for the task's; also a function ``f(sample, control)`` of [B, *D] and values
            [B] by name, which gives [B] nats.
        controls: of a reward function, see `ctrl_rl.rewards.FunctionReward`; none if None.
        differentiable: whether a reward function's result carries a gradient; True if None.
        upper_bound: of a reward function, nats; None makes the gap an estimate.
        control_law: how the controls of an episode are drawn; "balanced" if None.
        policy: what is trained; None for the task's, or "fine_tuned".
        updates: optimizer steps; None for the task's.
        seed: 0 if None.
        device: "cpu" if None.
        overrides: of everything else, such as ``["trainer.batch_size=32"]``.
        config_dirs: your folders with config groups, as `--config-dir` takes them.
        name: of the run's folder; None for one of task, agent and seed.
        root: where run folders live; "runs" if None.
        overwrite: whether to replace a run of the same name.
        resume: whether to go on with a run of the same name and settings if there is one; a
            finished one is loaded.
        quiet: no progress and no table.

    Raises:
        ConfigError: a name that does not exist, or a part that is none or does not fit.
        RunError: there is a run of that name, or one of other settings is to be resumed.
        Interrupted: stopped by the user; the message says how to go on.
    """
    if overwrite and resume:
        raise ConfigError("overwrite=True replaces a run, resume=True goes on with it; give one")
    given = {"agent": agent, "prior": prior, "kernel": kernel, "reward": reward}
    given |= {"control_law": control_law, "policy": policy}
    named = {key: part for key, part in given.items() if isinstance(part, str)}
    parts = {
        key: part for key, part in given.items() if part is not None and not isinstance(part, str)
    }
    for key, part in parts.items():
        check_part(key, part)
    words = {"env": task, **named, "trainer.updates": updates, "seed": seed, "device": device}
    place = {"run.name": name, "run.root": root, "run.overwrite": overwrite or None}
    config = _composed(words, place, parts, overrides, config_dirs)
    function = {"controls": controls, "differentiable": differentiable, "upper_bound": upper_bound}
    _record(config, parts, function)
    unrecorded = {key: part for key, part in parts.items() if key in config.get(GIVEN, {})}
    run = Run(build.build_run_plan(config).path)
    if not _is_finished(run, config, overwrite=overwrite, resume=resume):
        threads = torch.get_num_threads()
        try:
            train_and_evaluate(
                config,
                run if resume and run.checkpoints() else None,
                quiet=quiet,
                given=makers(config, unrecorded),
            )
        finally:
            torch.set_num_threads(threads)
    return LoadedRun(run, trust=own_modules(config), parts=unrecorded)


def _composed(
    words: Mapping[str, Any],
    place: Mapping[str, Any],
    parts: Mapping[str, Any],
    overrides: Sequence[str],
    config_dirs: Sequence[str | Path],
) -> DictConfig:
    """The config, before objects are put into it.

    Args:
        words: values by key, as overrides take them; None for those that are not given.
        place: the same; as they may hold any character, they are set afterwards.
        parts: objects by name.
        overrides: more words.
        config_dirs: more folders.
    """
    overrides = [overrides] if isinstance(overrides, str) else list(overrides)
    config_dirs = [config_dirs] if isinstance(config_dirs, str | Path) else config_dirs
    words = {key: value for key, value in words.items() if value is not None}
    place = {key: value for key, value in place.items() if value is not None}
    keys = [word.partition("=")[0].lstrip("+~") for word in overrides]
    for key, word in zip(keys, overrides, strict=True):
        if key in words or key in place:
            given = words.get(key, place.get(key))
            raise ConfigError(f"{word} in overrides and {key}={given}; give one of them")
        if key.partition(".")[0] in parts:
            part = key.partition(".")[0]
            raise ConfigError(
                f"{word} changes a yaml, and {part} is {label_of(parts[part])}; give arguments by "
                "functools.partial"
            )
    own = "env" not in words and not {"env", "experiment"} & set(keys)
    if own:
        for part in ("prior", "reward"):
            if part not in words and part not in parts:
                raise ConfigError(
                    f"no task and no {part}; name a task, such as train('faces'), or give both "
                    "prior= and reward="
                )
    chosen = [f"{key}={value}" for key, value in words.items()]
    folders = [str(each) for each in config_dirs]
    config = compose("train", [*(_OWN if own else []), *chosen, *overrides], folders)
    for key, value in place.items():
        OmegaConf.update(config, key, str(value) if isinstance(value, Path) else value)
    return config


def _record(config: DictConfig, parts: Mapping[str, Any], function: dict[str, Any]) -> None:
    """Put what can be said of the given parts into the config."""
    reward, usual = parts.get("reward"), _usual_name(config)
    if reward is None or not is_function("reward", reward):
        has = "one of a yaml" if reward is None else label_of(reward)
        for key, value in function.items():
            if value is not None:
                raise ConfigError(
                    f"{key}={value} is for a reward function, and the reward is {has}"
                )
    for key, part in parts.items():
        if is_function(key, part):
            known = function["controls"] or {}
            differentiable = function["differentiable"] is not False
            settings = {**function, "controls": known, "differentiable": differentiable}
            record(config, key, part, **settings)
            _drop_judges(config, known)
        else:
            record(config, key, part)
            if isinstance(part, Reward):
                _drop_judges(config, part.controls)
    if config.run.name == usual:
        config.run.name = _usual_name(config)


def _usual_name(config: DictConfig) -> str:
    """As in `configs/train.yaml`."""
    return f"{config.env.name}-{config.choices.agent}-s{config.seed}"


def _drop_judges(config: DictConfig, controls: Mapping[str, Any]) -> None:
    """Leave out the task's held-out judges of controls that the given reward does not have."""
    judges = config.evaluation.heldout
    kept = OmegaConf.masked_copy(judges, [name for name in judges if name in controls])
    config.evaluation.heldout = kept


def _is_finished(run: Run, config: DictConfig, *, overwrite: bool, resume: bool) -> bool:
    """Whether there is nothing left to train; refuses a folder that is there for something else."""
    if overwrite or not run.config_file.is_file():
        return False
    if not resume:
        raise RunError(
            f"run folder {run.path} exists; resume=True goes on with it, overwrite=True replaces "
            "it, or give another name="
        )
    differs = difference(run.path, config)
    if differs is not None:
        raise RunError(
            f"{run.path} was trained with {differs}; resume=True needs the same settings, "
            "overwrite=True starts anew"
        )
    if not run.checkpoints():
        config.run.overwrite = True  # it was stopped before the first one
    config.trainer.microbatch = stored(run.config_file).trainer.get("microbatch")
    return bool(run.summary)
