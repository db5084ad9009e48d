"""Checks of one rollout before the first update, and of every reward after it."""

import re
from copy import deepcopy

import torch
from tensordict import TensorDict

from ctrl_rl.agents.agent import Phase
from ctrl_rl.agents.parts.returns import episode_reward
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import RolledChain, check_invariants, rollout
from ctrl_rl.errors import ConfigError, InvariantError, did_you_mean, one_line
from ctrl_rl.learning.learner import Learner
from ctrl_rl.learning.replay import Replay, check_refresh
from ctrl_rl.policies import DenoisingPolicy
from ctrl_rl.rewards.reward import check_reward_bound

_COMPILERS = ("torch._dynamo", "torch._inductor")  # modules of torch.compile's errors


def compile_networks(backend: str, process: DenoisingProcess, *policies: DenoisingPolicy) -> None:
    """Compile the networks of a prior and of policies on it with `torch.compile`.

    Args:
        backend: of `torch.compile`.
        process: gives the prior.
        *policies: which may have their own networks.

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
    compiled = [policy.compile_network(backend) for policy in policies]
    if not any([process.compile_network(backend), *compiled]):
        raise ConfigError(
            f"compile={backend}: neither this prior nor this policy has a network that is worth "
            "compiling; use compile=null"
        )


def check_start(env: LatentEnv, learner: Learner, *, tolerance: float = 0.0) -> None:
    """Check contracts and invariants on one rollout of the untrained policy per plan.

    It leaves no trace.

    Args:
        env: of training.
        learner: with the untrained policy.
        tolerance: how far policy and prior may be apart, in nats per dimension; see
            `check_invariants`.

    Raises:
        ConfigError: prior, policy and reward do not fit each other, the agent reads a key that
            rollouts lack, or gives no losses.
        InvariantError: the policy is not the prior, or a gradient that the agent needs is missing.
        NonFiniteError: a sample or its reward is not finite.
    """
    before = env.generator.get_state()
    for phase in deepcopy(learner.agent).phases.values():  # they may keep state
        try:
            episode = _first_episode(env, learner, phase.plan, tolerance)
            _try(phase, episode, env, learner)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"a first rollout of {env.batch_size[0]} episodes and its loss do not fit into the "
                "device's memory; use trainer.microbatch=auto, or a smaller number than it has"
            ) from error
    env.generator.set_state(before)
    env.process.prior_calls = env.process.reward_calls = learner.policy.calls = 0


def _first_episode(
    env: LatentEnv, learner: Learner, plan: RolloutPlan, tolerance: float
) -> TensorDict:
    process, policy = env.process, learner.policy
    try:
        episode = rollout(env, policy, plan=plan)
        check_invariants(episode, plan, tolerance=tolerance)
        if plan.reevaluates_policy:
            check_refresh(policy, episode)
    except torch.OutOfMemoryError:
        raise  # a kind of RuntimeError
    except RuntimeError as error:  # what torch raises for shapes that do not fit
        reason = one_line(error)
        if type(error).__module__.startswith(_COMPILERS):
            raise ConfigError(f"compile fails ({reason}); compile=null does without") from error
        raise ConfigError(f"prior, policy and reward do not fit each other: {reason}") from error
    if plan.gradients == "pathwise" and not episode_reward(episode).requires_grad:
        name = type(process.reward_model).__name__
        raise InvariantError(
            f"{name} says that it is differentiable, and its result has no graph; say "
            "differentiable=false, and use an agent that needs no gradient, such as reinforce"
        )
    check_reward(env, episode)
    return episode


def _try(phase: Phase, episode: TensorDict, env: LatentEnv, learner: Learner) -> None:
    """Let a phase prepare a rollout and compute a first loss; name a key that it lacks."""
    named, policy = type(phase).__name__, learner.policy
    try:
        prepared = phase.prepare(episode, RolledChain(env, policy))
        if not isinstance(prepared, TensorDict):
            raise ConfigError(f"{named}.prepare gave {type(prepared).__name__}, not the rollout")
        batches = Replay(phase.plan, env.generator).batches(prepared, policy)
        losses = phase.loss(next(next(batches)))
    except KeyError as error:
        missing = re.search(r'key "([^"]+)" not found', str(error))  # tensordict's words
        if missing is None:
            raise
        present = [str(key) for key in episode.keys(include_nested=True)]
        hint = did_you_mean(missing[1], present)
        raise ConfigError(f"{named} reads '{missing[1]}'; {hint}") from error
    if not isinstance(losses, TensorDict):
        raise ConfigError(f"{named}.loss gave {type(losses).__name__}, not a TensorDict")
    if not any(str(key).startswith("loss_") for key in losses.keys()):
        raise ConfigError(f"{named}.loss gave no loss; name at least one of its results loss_…")


def check_reward(env: LatentEnv, episode: TensorDict) -> None:
    """Refuse rewards above the bound that the reward states.

    Raises:
        ConfigError: one exceeds it.
    """
    bound = env.process.reward_upper_bound
    if bound is not None:
        check_reward_bound(episode_reward(episode), "the reward", bound)
