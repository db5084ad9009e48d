"""`evaluate_policy`: the certified gap of a policy that another library trained."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ctrl_rl.controls import Value
from ctrl_rl.errors import ConfigError
from ctrl_rl.evaluation.evaluate import Evaluation, EvaluationPlan, evaluate
from ctrl_rl.evaluation.foreign import Act, ForeignSampler
from ctrl_rl.rewards.classifier import LabelModel
from ctrl_rl.runs import build
from ctrl_rl.runs.compose import compose


def evaluate_policy(
    task: Any,
    act: Act,
    *,
    overrides: Sequence[str] = (),
    plan: EvaluationPlan | None = None,
    conditions: Sequence[Mapping[str, Value]] | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure any policy of the control env: J, log Z and the certified gap between them.

        evaluation = ctrl_rl.evaluate_policy("mixture2d", lambda obs: model.predict(obs)[0])
        evaluation.summary["gap_nats"], evaluation.summary["gap_nats_certified"]

    With u = control_scale * act(observation) the policy's step is N(prior_loc + scale u, scale^2 I)
    and its KL is exactly |u|^2 / 2, so every figure holds that holds for a policy of this project.
    Nothing is clipped, as the env does not clip.

    `act` may be random. Then every drawn u pays its |u|^2 / 2, and the gap is the KL of an extended
    path, with every u written down. It bounds the KL of the samples, as always, and also counts the
    policy's own noise; `ctrl_rl.evaluation.foreign` has the proof. The env has noise already, so
    the mean action is usually the better policy: measure that one. Random numbers of `act` are its
    own: seed them for figures that can be repeated.

    Args:
        task: a name, such as "mixture2d", or an env that `gymnasium.make` or `gymnasium.make_vec`
            made of one; of its wrappers nothing is used.
        act: from an observation of the vector env, that is NumPy arrays "x" [B, *S] float32, "step"
            [B] int64, the same for all, and "control_<name>" [B], to actions [B, *S]. B varies. The
            rows must not depend on each other, or intervals are wrong. It may remember the calls of
            an episode: step 0 begins new ones, and the others follow in order.
        overrides: of the task's config, such as ``["kernel.num_steps=20"]``; those of training.
        plan: numbers of samples and the like; None for the `evaluation` of a named task's config,
            and `EvaluationPlan()` for an env.
        conditions: such as `[{"group": 2}]`; an omitted control asks for nothing. None for all.
        report: called with (conditions done, conditions in all), for a progress bar.

    Returns:
        What `ctrl_rl.evaluation.evaluate.evaluate` gives. In `summary`: "gap_nats", its interval
        "gap_nats_ci", "gap_nats_certified", "kl_nats", "reward", "prior", "per_label" and more.
        Held-out classifiers judge where a named task has some.

    Raises:
        ConfigError: an unknown task or override, an `act` that gives no actions (found before any
            of the prior's samples are drawn), an unknown condition.
    """
    heldout: Mapping[str, LabelModel] = {}
    if isinstance(task, str):
        config = compose("train", [f"env={task}", *overrides])
        process, control_scale = build.build_process(config), float(config.env.control_scale)
        plan = plan or build.build_evaluation_plan(config)
        heldout = build.build_heldout(config, process)
    else:
        process, control_scale = _parts(task)
        if overrides:
            raise ConfigError(
                "overrides= changes a task that is given by name; give them to the env"
            )
    sampler = ForeignSampler(process, act, control_scale=control_scale)
    return evaluate(
        sampler, plan or EvaluationPlan(), heldout=heldout, conditions=conditions, report=report
    )


def _parts(env: Any) -> tuple[Any, float]:
    """Process and control scale of a control env."""
    inner = getattr(env, "unwrapped", env)
    try:
        return inner.process, inner.control_scale
    except AttributeError:
        raise ConfigError(
            f"task is a {type(env).__name__}; give a name, such as 'mixture2d', or a control env: "
            "gymnasium.make_vec of a task, or ControlVectorEnv(process, num_envs=1, "
            "control_scale=…)"
        ) from None
