"""Public Python: load a run, sample from it, evaluate it; make environments of tasks."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gymnasium.vector import AutoresetMode
from torch import Tensor

from ctrl_rl.controls import Value, Values, described
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.control import ControlEnv, ControlVectorEnv
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.errors import ConfigError, RunError
from ctrl_rl.evaluation.evaluate import Evaluation, EvaluationPlan, evaluate
from ctrl_rl.evaluation.samplers import PolicySampler, Sampler
from ctrl_rl.evaluation.side_by_side import Strip
from ctrl_rl.learning.checkpoint import NO_TRAINING, Checkpoint
from ctrl_rl.policies import DenoisingPolicy, PriorPolicy
from ctrl_rl.priors import Prior
from ctrl_rl.runs import build
from ctrl_rl.runs.compose import compose, saved
from ctrl_rl.runs.folder import Run


def make_process(task: str, overrides: Sequence[str] = ()) -> DenoisingProcess:
    """The MDP of a task, such as "digits"."""
    return build.build_process(compose("train", [f"env={task}", *overrides]))


def make_env(
    task: str, *, num_envs: int = 64, seed: int | None = None, overrides: Sequence[str] = ()
) -> LatentEnv:
    """The TorchRL env of a task.

    Args:
        task: name of a yaml in `configs/env`, such as "digits".
        num_envs: batch size.
        seed: of the env's generator; None takes a fresh one.
        overrides: Hydra overrides, such as ``["kernel.num_steps=20"]``.
    """
    process = make_process(task, overrides)
    return LatentEnv(process, num_envs=num_envs, seed=seed, device=process.kernel.scale.device)


def make_control_env(
    task: str, *, overrides: Sequence[str] = (), render_mode: str | None = None
) -> ControlEnv:
    """Entry point of `gymnasium.make`; see `ControlEnv`."""
    config = compose("train", [f"env={task}", *overrides])
    process, scale = build.build_process(config), config.env.control_scale
    return ControlEnv(process, control_scale=scale, render_mode=render_mode)


# Where `gymnasium.make` looks for what it can make of frames: a list of them, or a window.
make_control_env.metadata = ControlEnv.metadata  # type: ignore[attr-defined]


def make_control_vector_env(
    task: str,
    *,
    num_envs: int,
    overrides: Sequence[str] = (),
    autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    render_mode: str | None = None,
) -> ControlVectorEnv:
    """Entry point of `gymnasium.make_vec`; see `ControlVectorEnv`."""
    config = compose("train", [f"env={task}", *overrides])
    return ControlVectorEnv(
        build.build_process(config),
        num_envs=num_envs,
        control_scale=config.env.control_scale,
        autoreset_mode=autoreset_mode,
        render_mode=render_mode,
    )


class LoadedRun:
    """A run, ready to sample.

    Attributes:
        config: the resolved config.
        env: the latent env, `trainer.batch_size` episodes.
        sampler: the trained policy, or a method that needs no training.
        prior: the pretrained model.
        update: of the checkpoint.
        cost: cost of training until the checkpoint: steps, calls, seconds.
        summary: contents of summary.json, or an empty dict before the evaluation.
    """

    def __init__(self, run: Run, checkpoint: int | None = None, trust: Sequence[str] = ()) -> None:
        self.run = run
        self.config = saved(run.config_file, trust=trust)
        self.sampler: Sampler
        process = build.build_process(self.config)
        self.env = build.build_env(self.config, process)
        # Older runs do not have it.
        process.execution.microbatch = self.config.trainer.get("microbatch")
        if self.config.get("method") is not None:
            self.cost, self.update = dict(NO_TRAINING), 0
            self.sampler = build.build_method(self.config, process)
        else:
            loaded = run.load(checkpoint)
            self.cost, self.update = loaded.cost, loaded.update
            self.sampler = PolicySampler(process, self._trained(loaded))

    def _trained(self, loaded: Checkpoint) -> DenoisingPolicy:
        policy = build.build_policy(self.config, self.env.process)
        prefix = "average.module."
        averaged = {
            name.removeprefix(prefix): value
            for name, value in loaded.training.items()
            if name.startswith(prefix)
        }
        try:
            policy.load_state_dict(averaged or loaded.policy)
        except RuntimeError as error:
            raise RunError(
                f"{self.run.path} holds weights of another policy than its config"
            ) from error
        policy.requires_grad_(False)
        return policy

    @property
    def policy(self) -> DenoisingPolicy:
        """The trained policy, or one that needs no training."""
        return self.sampler.policy

    @property
    def prior(self) -> Prior:
        """The pretrained model."""
        return self.env.process.prior

    @property
    def summary(self) -> dict[str, Any]:
        """Contents of summary.json, or an empty dict."""
        return self.run.summary

    def sample(
        self,
        control: Values | Mapping[str, Values] | None = None,
        n: int = 16,
        seed: int = 0,
        strength: float = 1.0,
    ) -> Tensor:
        """Draw clean samples.

        Args:
            control: a value, or [n] of them: a label by name or index, such as "yes" or 1, or a
                number for a numeric control. By name of the control if there are several, such as
                {"glasses": "yes"}; "prompt" takes one of the prior's prompts. A missing control, or
                "any", asks for nothing.
            n: number of samples.
            seed: same seed, same samples: the first 4 of 8 are those of ``n=4``, up to rounding.
            strength: drift relative to the trained policy's: 0 is the prior, 1 the policy.

        Returns:
            [n, *D] float32.

        Raises:
            ConfigError: a control, label, number or strength out of range.
        """
        return self.strip(control, n=n, seed=seed, strength=strength).samples

    def strip(
        self,
        control: Values | Mapping[str, Values] | None = None,
        n: int = 16,
        seed: int = 0,
        strength: float = 1.0,
    ) -> Strip:
        """Draw clean samples with their latents; everything else as `sample`.

        Strips of the same seed have the same noise, for any condition and strength.
        """
        process = self.env.process
        if n < 1:
            raise ConfigError(f"n={n} must be 1 or more")
        if not 0 <= strength < math.inf:
            raise ConfigError(f"strength={strength} must be >= 0; 0 is the prior, 1 the policy")
        build.check_seed(seed)
        control = {} if control is None else control
        if not isinstance(control, Mapping):
            if len(process.conditions.controls) != 1:
                known = described(process.conditions.controls)
                has = f"the controls {known}; give values by control" if known else "no control"
                raise ConfigError(f"this run has {has}")
            control = {next(iter(process.conditions.controls)): control}
        # At strength 0 every sampler is the prior.
        prior = PolicySampler(process, PriorPolicy(process.kernel))
        sampler = prior if strength == 0 else self.sampler.at_strength(strength)
        values = process.check_control(control, n)
        first = {name: value[0].item() for name, value in values.items()}
        title = process.conditions.title(first)
        return sampler.strip(values, title=title, n=n, seed=seed)

    def evaluate(
        self,
        plan: EvaluationPlan | None = None,
        report: Callable[[int, int], None] = lambda done, total: None,
        conditions: Sequence[Mapping[str, Value]] | None = None,
    ) -> Evaluation:
        """Measure the policy.

        Args:
            plan: numbers of samples and the like; None for the config's `evaluation`.
            report: called with (conditions done, conditions in all), for a progress bar.
            conditions: such as `[{"hat": "yes"}, {"glasses": "no"}]`; an omitted control asks for
                nothing. None for every combination of labels.
        """
        plan = plan or build.build_evaluation_plan(self.config)
        heldout = build.build_heldout(self.config, self.env.process)
        return evaluate(self.sampler, plan, heldout=heldout, conditions=conditions, report=report)


def load_run(
    path: str | Path, checkpoint: int | None = None, *, trust: Sequence[str] = ()
) -> LoadedRun:
    """Load a run folder, of anybody: nothing that it holds is run.

    Args:
        path: the folder, such as "runs/demo".
        checkpoint: update of the checkpoint to load; None for the newest.
        trust: names of your modules and packages that the run's config may name, such as
            ["my_rewards"]; the environment variable CTRL_RL_TRUST adds to them.

    Raises:
        RunError: there is no run, its config names code that is neither the project's nor trusted,
            or its checkpoint is damaged.
    """
    if isinstance(trust, str):
        trust = [trust]
    return LoadedRun(Run.open(Path(path)), checkpoint, trust)
