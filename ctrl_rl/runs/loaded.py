"""Public Python: load a run, sample from it, evaluate it."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ctrl_rl.controls import Value, Values, described
from ctrl_rl.errors import ConfigError, RunError
from ctrl_rl.evaluation.evaluate import Evaluation, EvaluationPlan, evaluate
from ctrl_rl.evaluation.samplers import PolicySampler, Sampler
from ctrl_rl.evaluation.show import as_html, in_lines
from ctrl_rl.evaluation.side_by_side import Strip
from ctrl_rl.learning.checkpoint import NO_TRAINING, Checkpoint
from ctrl_rl.policies import DenoisingPolicy, PriorPolicy
from ctrl_rl.priors import Prior
from ctrl_rl.runs import build
from ctrl_rl.runs.compose import saved
from ctrl_rl.runs.environments import make_control_env as make_control_env
from ctrl_rl.runs.environments import make_control_vector_env as make_control_vector_env
from ctrl_rl.runs.environments import make_env as make_env
from ctrl_rl.runs.environments import make_process as make_process
from ctrl_rl.runs.folder import Run, read_summary
from ctrl_rl.runs.parts import makers


class LoadedRun:
    """A run, ready to sample; `load_run` and `ctrl_rl.train` make it.

    Args:
        run: its folder.
        checkpoint: update of the checkpoint; None for the newest.
        trust: as in `load_run`.
        parts: by name, those that the config cannot build, or that replace what it does.

    Attributes:
        config: the resolved config.
        env: the latent env, `trainer.batch_size` episodes.
        sampler: the trained policy, or a method that needs no training.
        prior: the pretrained model.
        update: of the checkpoint.
        cost: cost of training until the checkpoint: steps, calls, seconds.
        summary: contents of summary.json, or an empty dict before the evaluation.
    """

    def __init__(
        self,
        run: Run,
        checkpoint: int | None = None,
        trust: Sequence[str] = (),
        parts: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.run = run
        self.config = saved(run.config_file, trust=trust)
        self.sampler: Sampler
        self._given = makers(self.config, parts)
        process = build.build_process(self.config, self._given)
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
        policy = build.build_policy(self.config, self.env.process, self._given)
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

    def __repr__(self) -> str:
        controls = described(self.env.process.conditions.controls) or "none"
        figures = in_lines(self._figures) if self._figures else ["not evaluated at this update"]
        return "\n  ".join([self._title, f"controls: {controls}", *figures])

    def _repr_html_(self) -> str:
        """For notebooks: the evaluation as a table, and its picture."""
        file = self.run.evaluation(self.update) / "samples.png"
        picture = file.read_bytes() if file.is_file() else None
        return as_html(self._title, self._figures, picture)

    @property
    def _title(self) -> str:
        choices = self.config.choices
        what = choices.get("method") or choices.agent
        return f"{self.run.path}: {what} on {self.config.env.name}, update {self.update}"

    @property
    def _figures(self) -> dict[str, Any]:
        """Of this checkpoint's evaluation; empty before it."""
        folder = self.run.evaluation(self.update)
        return read_summary(folder) if (folder / "summary.json").is_file() else {}

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
            control = {self._only_control(): control}
        # At strength 0 every sampler is the prior.
        prior = PolicySampler(process, PriorPolicy(process.kernel))
        sampler = prior if strength == 0 else self.sampler.at_strength(strength)
        values = process.check_control(control, n)
        first = {name: value[0].item() for name, value in values.items()}
        title = process.conditions.title(first)
        return sampler.strip(values, title=title, n=n, seed=seed)

    def _only_control(self) -> str:
        known = self.env.process.conditions.controls
        if not known:
            raise ConfigError("this run has no control; sample without one")
        if len(known) > 1:
            values = {name: control.shown(0) for name, control in known.items()}
            raise ConfigError(
                f"this run has the controls {described(known)}; give values by name, such as "
                f"control={values}"
            )
        return next(iter(known))

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
    path: str | Path,
    checkpoint: int | None = None,
    *,
    trust: Sequence[str] = (),
    prior: Any = None,
    kernel: Any = None,
    reward: Any = None,
    control_law: Any = None,
    policy: Any = None,
) -> LoadedRun:
    """Load a run folder, of anybody: nothing that it holds is run.

    Args:
        path: the folder, such as "runs/demo".
        checkpoint: update of the checkpoint to load; None for the newest.
        trust: names of your modules and packages that the run's config may name, such as
            ["my_rewards"]; the environment variable CTRL_RL_TRUST adds to them.
        prior: the part that was given to `ctrl_rl.train`, if the config could not record it; or
            one to use in place of the run's.
        kernel: the same.
        reward: the same; a function gets the controls of training.
        control_law: the same.
        policy: the same; it gets the trained weights.

    Raises:
        RunError: there is no run, its config names code that is neither the project's nor trusted,
            a part is missing that was given in Python, or its checkpoint is damaged.
        ConfigError: a part is none of its kind.
    """
    if isinstance(trust, str):
        trust = [trust]
    parts = {"prior": prior, "kernel": kernel, "reward": reward, "control_law": control_law}
    parts |= {"policy": policy}
    given = {name: part for name, part in parts.items() if part is not None}
    return LoadedRun(Run.open(Path(path)), checkpoint, trust, given)
