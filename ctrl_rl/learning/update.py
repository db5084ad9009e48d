"""One update, written once: a rollout, the agent's losses, gradients, optimizer steps."""

import gc
from collections.abc import Callable
from copy import deepcopy

import torch
from tensordict import TensorDict

from ctrl_rl.agents.agent import Phase
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import RolledChain, rollout
from ctrl_rl.errors import ConfigError
from ctrl_rl.learning.learner import Learner
from ctrl_rl.learning.replay import Replay


def update(
    env: LatentEnv,
    learner: Learner,
    phase: Phase,
    replay: Replay,
    *,
    step: Callable[[], dict[str, float]],
    check: Callable[[TensorDict], None] = lambda episode: None,
) -> tuple[TensorDict, dict[str, float]]:
    """Make one update.

    Args:
        env: where the episodes happen.
        learner: policy, agent and optimizer.
        phase: the agent's current one.
        replay: serves the batches of its plan.
        step: makes an optimizer step and gives its figures.
        check: refuses a rollout before anything is learned from it.

    Returns:
        The rollout [B, K], and what the losses and steps logged, averaged over optimizer steps.
    """
    episode = rollout(env, learner.policy, plan=phase.plan)
    check(episode)
    prepared = phase.prepare(episode, RolledChain(env, learner.policy))
    logged = []
    for pieces in replay.batches(prepared, learner.policy):
        losses = [learner.backward(phase.loss(piece)) for piece in pieces]
        made = step()
        # Pieces are parts of one sum, so their losses add up; other figures are averaged.
        total = sum(losses[1:], losses[0])
        figures = {
            name: float(value) / (1 if name.startswith("loss_") else len(losses))
            for name, value in total.items()
        }
        logged.append(figures | made)
    return episode, {name: sum(each[name] for each in logged) / len(logged) for name in logged[0]}


def rehearse(env: LatentEnv, learner: Learner) -> dict[float, int]:
    """Make an update of every phase without its optimizer steps; it leaves no trace.

    Returns:
        Evaluations of prior and policy that it took, counted in samples, by the share of training
        at which each phase begins.
    """
    process, policy, before = env.process, learner.policy, env.generator.get_state()
    counted = (process.prior_calls, process.reward_calls, policy.calls)
    calls = {}
    try:
        for start, phase in deepcopy(learner.agent).phases.items():  # which may keep a state
            process.prior_calls = policy.calls = 0
            update(env, learner, phase, Replay(phase.plan, env.generator), step=dict)
            calls[start] = process.prior_calls + policy.calls
    finally:
        learner.optimizer.zero_grad(set_to_none=True)
        process.prior_calls, process.reward_calls, policy.calls = counted
        env.generator.set_state(before)
    return calls


def fit_microbatch(env: LatentEnv, learner: Learner) -> int | None:
    """Find by trial how many samples the networks can take at once, and set it.

    A trial is a rehearsal, with room for the optimizer's moments instead of its step: first with
    all samples at once, then in parts of one batch, of half a batch and so on, until memory
    suffices. It leaves no trace. Any other failure in it is for `check_start` to report.

    Returns:
        Samples at once; None for all, without recomputing anything.

    Raises:
        ConfigError: not even one sample fits.
    """
    rows: int | None = None
    while True:
        env.process.execution.microbatch = rows
        try:
            _trial(env, learner)
            return rows
        except (RuntimeError, KeyError) as error:
            if not _is_full(error):
                return rows
            if rows == 1:
                raise ConfigError(
                    "an update of one sample at a time does not fit into the device's memory; use "
                    "prior.dtype=float16, a smaller prior.size or a smaller trainer.batch_size"
                ) from error
        gc.collect()  # the failed trial's memory
        if env.device.type == "cuda":
            torch.cuda.empty_cache()
        rows = env.batch_size[0] if rows is None else -(-rows // 2)


def _trial(env: LatentEnv, learner: Learner) -> None:
    groups = learner.optimizer.param_groups
    moments = [torch.empty_like(p) for group in groups for p in group["params"] for _ in range(2)]
    rehearse(env, learner)
    del moments


def _is_full(error: Exception) -> bool:
    """Whether an error says that memory is full; torch's libraries raise their own kind."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)
