"""What is asserted on one rollout before the first update, and of every reward after it."""

import gc
from copy import deepcopy

import torch
from tensordict import TensorDict

from ctrl_rl import keys
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.process import DenoisingProcess
from ctrl_rl.errors import ConfigError, InvariantError, NonFiniteError, did_you_mean, one_line
from ctrl_rl.evaluation.estimators import check_reward_bound
from ctrl_rl.learner import Learner
from ctrl_rl.plans import RolloutPlan
from ctrl_rl.policies import DenoisingPolicy
from ctrl_rl.replay import Replay, check_refresh
from ctrl_rl.rollouts import check_invariants, rollout
from ctrl_rl.soft_returns import episode_reward

_COMPILERS = ("torch._dynamo", "torch._inductor")  # where errors of torch.compile are from


def compile_networks(backend: str, process: DenoisingProcess, *policies: DenoisingPolicy) -> None:
    """Have `torch.compile` compile the networks of a prior and of policies on it.

    Args:
        backend: of `torch.compile`.
        process: gives the prior.
        *policies: whose networks may be their own.

    Raises:
        ConfigError: none has a network to compile, or the prior's is in half precision.
    """
    dtypes = {weight.dtype for weight in process.prior.denoiser.parameters()}
    if dtypes & {torch.float16, torch.bfloat16}:
        # Log-ratios of a policy that is the prior were up to 3e-3 nats per dimension in bfloat16.
        raise ConfigError(
            f"compile={backend} with a prior in half precision: compiled networks round otherwise "
            "with gradients than without, which log-ratios would take for a difference of policy "
            "and prior; use prior.dtype=float32, or compile=null"
        )
    found = [policy.compile_network(backend) for policy in policies]
    if not any([process.compile_network(backend), *found]):
        raise ConfigError(
            f"compile={backend}: neither this prior nor this policy has a network that is worth "
            "compiling; use compile=null"
        )


def check_start(env: LatentEnv, learner: Learner, *, tolerance: float = 0.0) -> None:
    """Contracts and invariants on one rollout per plan of the untrained policy.

    It leaves no trace.

    Args:
        env: of training.
        learner: with the untrained policy.
        tolerance: how far policy and prior may be apart, in nats per dimension; see
            `check_invariants`.

    Raises:
        ConfigError: prior, policy and reward do not fit each other, or the agent reads a key that
            rollouts do not have.
        InvariantError: the policy is not the prior, or a gradient that the agent needs is missing.
        NonFiniteError: a reward is not finite.
    """
    agent, before = learner.agent, env.generator.get_state()
    present: dict[str, None] = {}
    for plan in agent.plans.values():
        episode = _first_episode(env, learner, plan, tolerance)
        present |= dict.fromkeys(str(key) for key in episode.keys(include_nested=True))
    for key in agent.in_keys:
        if str(key) not in present:
            raise ConfigError(f"the agent reads '{key}'; {did_you_mean(str(key), present)}")
    env.generator.set_state(before)
    env.process.prior_calls = env.process.reward_calls = learner.policy.calls = 0


def _first_episode(
    env: LatentEnv, learner: Learner, plan: RolloutPlan, tolerance: float
) -> TensorDict:
    process, policy = env.process, learner.policy
    try:
        episode = rollout(env, policy, plan=plan)
        check_invariants(episode, plan, tolerance=tolerance)
        if plan.recomputes:
            check_refresh(policy, episode)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a first rollout of {env.batch_size[0]} episodes does not fit into the device's "
            "memory; use trainer.microbatch=auto, or a smaller number than it has"
        ) from error
    except RuntimeError as error:  # torch's kind for shapes that do not fit
        reason = one_line(error)
        if type(error).__module__.startswith(_COMPILERS):
            raise ConfigError(f"compile fails ({reason}); compile=null does without") from error
        raise ConfigError(f"prior, policy and reward do not fit each other: {reason}") from error
    reward = episode[keys.BRANCH_REWARD] if plan.branches else episode_reward(episode)
    needed = plan.gradients == "pathwise" and learner.agent.needs_reward_gradient
    if needed and not reward.requires_grad:
        name = type(process.reward_model).__name__
        raise InvariantError(f"{name} says that it is differentiable, and its result has no graph")
    check_reward(env, episode)
    return episode


def fit_microbatch(env: LatentEnv, learner: Learner) -> int | None:
    """Find by trial how many samples the networks can be given at once, and set it.

    A trial is one whole update of all the agent's plans, with room for the optimizer's moments in
    the place of its step: with all samples at once, then in parts of a batch, of halves of it and
    so on, until memory suffices. It leaves no trace. What else goes wrong in it is `check_start`'s
    to report.

    Returns:
        Samples at once; None for all, without recomputing anything.

    Raises:
        ConfigError: not even one sample fits.
    """
    rows: int | None = None
    while True:
        set_microbatch(env, learner, rows)
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
        gc.collect()  # of what the failed trial had
        if env.device.type == "cuda":
            torch.cuda.empty_cache()
        rows = env.batch_size[0] if rows is None else -(-rows // 2)


def _is_full(error: Exception) -> bool:
    """Whether an error says that memory is full; torch's libraries have a kind of their own."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


def set_microbatch(env: LatentEnv, learner: Learner, rows: int | None) -> None:
    """Give the networks of prior, reward and policy so many samples at once at most."""
    env.process.set_microbatch(rows)
    for policy in (learner.policy, learner.result):
        policy.set_microbatch(rows)


def _trial(env: LatentEnv, learner: Learner) -> None:
    process, policy, before = env.process, learner.policy, env.generator.get_state()
    counted = (process.prior_calls, process.reward_calls, policy.calls)
    agent = deepcopy(learner.agent)  # which may keep a state
    groups = learner.optimizer.param_groups
    moments = [torch.empty_like(p) for group in groups for p in group["params"] for _ in range(2)]
    try:
        for plan in agent.plans.values():
            episode = agent.prepare(rollout(env, policy, plan=plan))
            for pieces in Replay(plan, env.generator).batches(episode, policy):
                for piece in pieces:
                    learner.backward(agent.loss(piece))
    finally:
        del moments
        learner.optimizer.zero_grad(set_to_none=True)
        process.prior_calls, process.reward_calls, policy.calls = counted
        env.generator.set_state(before)


def calls_per_update(env: LatentEnv, learner: Learner) -> dict[float, int]:
    """Evaluations of prior and policy in one update, counted in samples on a dry one.

    A dry update is a rollout and every batch of a plan without a loss. It leaves no trace;
    `Agent.prepare` is left out, which sees neither prior nor policy and may keep a state.

    Returns:
        By the share of training at which each of the agent's plans begins.
    """
    process, policy = env.process, learner.policy
    before = env.generator.get_state()
    counted = (process.prior_calls, process.reward_calls, policy.calls)
    calls = {}
    for start, plan in learner.agent.plans.items():
        process.prior_calls = policy.calls = 0
        episode = rollout(env, policy, plan=plan)
        for pieces in Replay(plan, env.generator).batches(episode, policy):
            for _ in pieces:
                pass  # a piece calls the policy when it is made
        calls[start] = process.prior_calls + policy.calls
    process.prior_calls, process.reward_calls, policy.calls = counted
    env.generator.set_state(before)
    return calls


def check_reward(env: LatentEnv, episode: TensorDict) -> None:
    """Refuse rewards that no evaluation could use.

    Raises:
        NonFiniteError: one is not finite; names its labels.
        ConfigError: one exceeds the bound that the reward states.
    """
    reward = episode_reward(episode)
    bad = (~torch.isfinite(reward)).nonzero()
    if len(bad):
        where = int(bad[0])
        asked = {name: int(episode[keys.CONTROL, name][where, 0]) for name in env.process.context}
        named = env.process.name_of(asked)
        raise NonFiniteError(f"the reward is {reward[where].item()} for {named}")
    if env.process.reward_upper_bound is not None:
        check_reward_bound(reward, "the reward", env.process.reward_upper_bound)
