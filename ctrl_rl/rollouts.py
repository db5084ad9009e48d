"""The one place that rolls a policy out, and what is derived from a rollout.

A rollout is a TensorDict [B, K] with the keys of `ctrl_rl.keys`. Two derived quantities per step
are formed here for all agents: the closed-form KL and the log-ratio, both in nats.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, stack
from torch import Tensor

from ctrl_rl import gaussian, keys
from ctrl_rl.adjoints import lean_adjoint, log_ratio_gradient, reward_gradient
from ctrl_rl.branches import anchor_kl, branch
from ctrl_rl.condition_rewards import condition_rewards
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.errors import InvariantError
from ctrl_rl.forward_process import noisy_copies
from ctrl_rl.labels import Labels
from ctrl_rl.plans import RolloutPlan
from ctrl_rl.policies import DenoisingPolicy, PriorPolicy


def rollout(
    env: LatentEnv,
    policy: DenoisingPolicy,
    *,
    plan: RolloutPlan | None = None,
    control: Mapping[str, Labels] | None = None,
) -> TensorDict:
    """Roll `policy` out in `env` for one episode of K steps.

    Args:
        env: B environments.
        policy: where the actions come from, unless the plan has the prior act; their noise is drawn
            from the env's generator.
        plan: what to keep the graph of, None keeps nothing; and whether policy and prior recompute
            activations from now on.
        control: labels by control, [B] or one for all, each by its name or its place, see
            `DenoisingProcess.check_control`; None draws them from the control law.

    Returns:
        [B, K] with every key of `ctrl_rl.keys`.
    """
    plan = plan or RolloutPlan(gradients=None)
    for network in (policy, env.process):
        network.set_checkpointing(plan.checkpointing)
    num_steps = env.process.num_steps
    first = _first_step_with_gradient(plan, num_steps, env.generator)
    initial = None
    if control is not None:
        labels = env.process.check_control(control, env.batch_size[0])
        nested = TensorDict({keys.CONTROL: labels}, batch_size=env.batch_size)
        initial = nested.to(env.device)
    steps = []
    with torch.set_grad_enabled(first == 0):
        state = env.reset(initial)
    pathwise = plan.gradients == "pathwise"
    acting = policy if plan.behaviour == "policy" else PriorPolicy(policy.kernel)
    for k in range(num_steps):
        with torch.set_grad_enabled(k >= first):
            state = acting(state, generator=env.generator)
            state.set(keys.BEHAVIOUR_LOC, state[keys.LOC].detach())
            if acting is not policy and plan.gradients is not None:
                state.set(keys.LOC, _loc(policy, state))
        # Where the action is a constant to what follows, its density is still a function of loc.
        if not pathwise:
            state.set(keys.ACTION, state[keys.ACTION].detach())
        with torch.set_grad_enabled(k >= first and pathwise):
            after = env.step(state)["next"]
        with torch.set_grad_enabled(k >= first):
            steps.append(_record(state, after))
        state = after.exclude(keys.REWARD)
    result = stack(steps, 1)
    sample = state[keys.SAMPLE]
    repeated = sample[:, None].expand(-1, num_steps, *sample.shape[1:])
    result.set(keys.SAMPLE, repeated)  # a view: no memory per step
    clean, additions = state[keys.PRIOR_LOC], _additions(env, policy)
    for name in plan.adds:
        result.update(additions[name](result, clean))
    if plan.branches:
        reward, kl = branch(env.process, policy, result, clean, plan, env.generator)
        result.set(keys.BRANCH_REWARD, reward)
        result.set(keys.BRANCH_KL, kl)
    if plan.anchor:
        result.set(keys.ANCHOR_KL, anchor_kl(policy, result, plan, env.generator))
    return result


def _additions(
    env: LatentEnv, policy: DenoisingPolicy
) -> dict[str, Callable[[TensorDict, Tensor], dict[str, Any]]]:
    """Entries by the names of `plans.ADDITIONS`, of episodes [B, K] and their clean latents."""
    process, generator = env.process, env.generator

    def repeated(value: Tensor) -> Tensor:
        """[B, C] along the steps: [B, K, C], a view."""
        return value[:, None].expand(-1, process.num_steps, -1)

    return {
        "lean_adjoint": lambda episodes, clean: {
            keys.LEAN_ADJOINT: lean_adjoint(process, episodes)
        },
        "balance_gradients": lambda episodes, clean: {
            keys.REWARD_GRADIENT: reward_gradient(process, episodes),
            keys.LOG_RATIO_GRADIENT: log_ratio_gradient(process, policy, episodes),
        },
        "condition_rewards": lambda episodes, clean: {
            keys.CONDITION_REWARDS: repeated(
                condition_rewards(process, episodes[keys.SAMPLE][:, 0])
            )
        },
        "forward_process": lambda episodes, clean: {
            keys.FORWARD: noisy_copies(process, policy, episodes, clean, generator)
        },
    }


def _loc(policy: DenoisingPolicy, state: TensorDict) -> Tensor:
    """The policy's mean at a state that another one acts in."""
    control = dict(state[keys.CONTROL].items())
    policy.calls += len(state)
    return policy.loc(state[keys.X], state[keys.STEP], control, state[keys.PRIOR_LOC])


def _record(state: TensorDict, after: TensorDict) -> TensorDict:
    kept = (keys.X, keys.STEP, keys.CONTROL, keys.ACTION, keys.LOC, keys.SCALE, keys.PRIOR_LOC)
    record = state.select(*kept, keys.BEHAVIOUR_LOC)
    action, loc = state[keys.ACTION], state[keys.LOC]
    prior_loc, scale = state[keys.PRIOR_LOC], state[keys.SCALE]
    record.set(keys.ACTION_LOG_PROB, gaussian.log_prob(action, loc, scale))
    record.set(keys.PRIOR_LOG_PROB, gaussian.log_prob(action, prior_loc, scale))
    record.set(keys.KL, gaussian.kl(loc, prior_loc, scale))
    record.set(keys.LOG_RATIO, gaussian.log_ratio(action, loc, prior_loc, scale))
    record.set("next", after.select(keys.REWARD, "done", "terminated"))
    return record


def _first_step_with_gradient(plan: RolloutPlan, num_steps: int, generator: torch.Generator) -> int:
    if plan.gradients is None or plan.recomputes or plan.branches:
        return num_steps
    if plan.truncation is None:
        return 0
    if isinstance(plan.truncation, int):
        return max(0, num_steps - plan.truncation)
    draw = torch.randint(num_steps, (1,), generator=generator, device=generator.device)
    return int(draw)


def check_invariants(episode: TensorDict, plan: RolloutPlan, *, tolerance: float = 0.0) -> None:
    """Assert what mathematics guarantees of an untrained policy, before the first update.

    Args:
        episode: a rollout of the untrained policy under `plan`.
        plan: the agent's plan.
        tolerance: of log-ratios and KLs, in nats per dimension; 0 where both networks are run by
            the same code, as those that are not compiled are.

    Raises:
        InvariantError: a log-ratio or KL that is not 0, or a KL without a gradient.
    """
    dims = episode[keys.X][0, 0].numel()
    for key in (keys.LOG_RATIO, keys.KL):
        worst = episode[key].abs().max().item()
        if not worst <= tolerance * dims:
            raise InvariantError(
                f"the untrained policy has |{key}| up to {worst:.3g} nats where "
                f"{tolerance * dims or 'exactly 0'} is due: policy and prior must share weights, "
                f"precision and evaluation mode{'; try compile=null' if tolerance else ''}"
            )
    differentiated = keys.BRANCH_KL if plan.branches else keys.KL
    if plan.gradients and not plan.recomputes and not episode[differentiated].requires_grad:
        raise InvariantError("the KL term carries no gradient, so it would not act on the policy")
