"""The one place that rolls a policy out, and the quantities derived from a rollout.

A rollout is a TensorDict [B, K] with the keys of `ctrl_rl.keys`. Two derived quantities per step
are formed here for all agents: the closed-form KL and the log-ratio, both in nats.
"""

from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDict, stack
from torch import Tensor

from ctrl_rl import gaussian, keys
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.conditions import Condition
from ctrl_rl.controls import Values
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.errors import InvariantError
from ctrl_rl.kernels import TransitionKernel
from ctrl_rl.policies import DenoisingPolicy, PriorPolicy


def rollout(
    env: LatentEnv,
    policy: DenoisingPolicy,
    *,
    plan: RolloutPlan | None = None,
    control: Mapping[str, Values] | None = None,
) -> TensorDict:
    """Roll `policy` out in `env` for one episode of K steps.

    Args:
        env: B environments.
        policy: source of the actions, unless the plan lets the prior act; their noise is drawn from
            the env's generator.
        plan: what to keep the graph of, None keeps nothing; and whether policy and prior recompute
            activations from now on.
        control: values by control, [B] or one for all, labels by name or place, see
            `DenoisingProcess.check_control`; None draws them from the control law.

    Returns:
        [B, K] with every key of `ctrl_rl.keys`.
    """
    plan = plan or RolloutPlan(gradients=None)
    env.process.execution.checkpointing = plan.checkpointing
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
        # Even where later steps see the action as a constant, its density is a function of loc.
        if not pathwise:
            state.set(keys.ACTION, state[keys.ACTION].detach())
        with torch.set_grad_enabled(k >= first and pathwise):
            after = env.step(state)["next"]
        with torch.set_grad_enabled(k >= first):
            steps.append(_record(state, after))
        state = after.exclude(keys.REWARD)
    result = stack(steps, 1)
    # Views: no memory per step.
    for key, last in {keys.CLEAN: state[keys.PRIOR_LOC], keys.SAMPLE: state[keys.SAMPLE]}.items():
        result.set(key, last[:, None].expand(-1, num_steps, *last.shape[1:]))
    return result


class RolledChain:
    """The chain of an env and a policy, see `ctrl_rl.agents.agent.Chain`.

    Args:
        env: its process answers and counts, its generator draws.
        policy: its calls are counted.
    """

    def __init__(self, env: LatentEnv, policy: DenoisingPolicy) -> None:
        self.process, self.policy, self.generator = env.process, policy, env.generator
        # What an agent may ask of the process, passed through.
        self.prior_loc = env.process.prior_loc
        self.clean_estimate = env.process.clean_estimate
        self.decode = env.process.prior.decode
        self.policy_loc = policy.loc

    @property
    def kernel(self) -> TransitionKernel:
        """Tables of every step."""
        return self.process.kernel

    @property
    def conditions(self) -> Sequence[Condition]:
        """Every condition of the task."""
        return self.process.conditions

    def reward(self, sample: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """The process's reward.

        Raises:
            InvariantError: it must be differentiable and is not.
        """
        reward = self.process.reward(sample, control)
        if torch.is_grad_enabled() and sample.requires_grad and not reward.requires_grad:
            model = self.process.reward_model
            name = type(model).__name__
            raise InvariantError(
                f"{name} says that it is differentiable, and its result has no graph"
                if model.differentiable
                else f"the agent differentiates {name}, which is not differentiable; an agent that "
                "says needs_reward_gradient = True is refused before any work"
            )
        return reward


def _loc(policy: DenoisingPolicy, state: TensorDict) -> Tensor:
    """The policy's mean at a state in which another policy acts."""
    control = dict(state[keys.CONTROL].items())
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
    if plan.gradients is None or plan.reevaluates_policy:
        return num_steps
    if plan.truncation is None:
        return 0
    if isinstance(plan.truncation, int):
        return max(0, num_steps - plan.truncation)
    draw = torch.randint(num_steps, (1,), generator=generator, device=generator.device)
    return int(draw)


def check_invariants(episode: TensorDict, plan: RolloutPlan, *, tolerance: float = 0.0) -> None:
    """Assert what mathematics guarantees for an untrained policy, before the first update.

    Args:
        episode: a rollout of the untrained policy under `plan`.
        plan: the agent's plan.
        tolerance: of log-ratios and KLs, in nats per dimension; 0 where both networks run the same
            code, as uncompiled ones do.

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
    if plan.gradients and not plan.reevaluates_policy and not episode[keys.KL].requires_grad:
        raise InvariantError("the KL term carries no gradient, so it would not act on the policy")
