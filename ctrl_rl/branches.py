r"""One policy step taken once more with a graph, off a rollout that has none.

From a latent x at step k the policy takes its step, and the prior estimates the clean sample from
where it leads, in one call:

    a ~ pi(. | x, k, y),   branch_reward = r(clean_estimate(a, k + 1), y),   branch_kl = KL_k(x).

The gradient passes through that estimate, the step and the policy; x is a constant. At k = K - 1
the estimate is the chain's own read-out, before that it stands for the steps that are left. The
rollout itself stays what the policy does, so that its reward and KL are those of whole episodes.

What only sees some last steps leaves the others' drift without a price, and a network that steps
share then carries it there. The anchor is that price at one of those steps j, drawn uniformly:

    anchor_kl = (number of those steps) KL_j(x_j),     in the mean the sum of their KLs,

with x_j a constant: it costs one policy call, whatever K.
"""

import torch
from tensordict import TensorDict
from torch import Tensor

from ctrl_rl import gaussian, keys
from ctrl_rl.envs.process import DenoisingProcess
from ctrl_rl.plans import RolloutPlan
from ctrl_rl.policies import DenoisingPolicy


def branch(
    process: DenoisingProcess,
    policy: DenoisingPolicy,
    episodes: TensorDict,
    clean: Tensor,
    plan: RolloutPlan,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The branch that a plan asks for.

    Args:
        process: the MDP; calls of prior and reward are counted.
        policy: the policy; its calls are counted.
        episodes: [B, K] of a rollout.
        clean: [B, *S] the clean latents that the episodes ended in.
        plan: with `one_step_of`, k is drawn from the last steps and x is the rollout's x_k. With
            `renoise`, k is K - 1 and x is drawn that many times per episode from the forward
            process, N(signal_k clean, noise_k^2 I), and results are averaged.
        generator: draws k, noise and actions.

    Returns:
        Reward and KL [B, K] in nats with their graph, 0 but for step k.
    """
    num_episodes, num_steps = episodes.batch_size
    device = generator.device
    if plan.one_step_of is not None:
        late = plan.steps_in_sight(num_steps)
        k = num_steps - 1 - int(torch.randint(late, (1,), generator=generator, device=device))
        copies, x = 1, episodes[keys.X][:, k]
    else:
        k, copies = num_steps - 1, plan.renoise
        repeated = clean.repeat_interleave(copies, 0)
        noise = torch.randn(repeated.shape, generator=generator, device=device)
        x = process.kernel.signal[k] * repeated + process.kernel.noise[k] * noise
    x = x.detach()
    step = episodes[keys.STEP][:, k].repeat_interleave(copies, 0)
    labels = episodes[keys.CONTROL][:, k].items()
    control = {name: label.repeat_interleave(copies, 0) for name, label in labels}
    with torch.no_grad():
        prior_loc = process.prior_loc(x, step, control)
    with torch.enable_grad():
        loc = policy.loc(x, step, control, prior_loc)
        policy.calls += len(x)
        scale = process.kernel.scale[step]
        action = gaussian.draw(loc, scale, generator)
        estimate = process.prior.decode(process.clean_estimate(action, step + 1, control))
        here = torch.arange(num_steps, device=device) == k
        per_copy = (process.reward(estimate, control), gaussian.kl(loc, prior_loc, scale))
        reward, kl = (
            each.unflatten(0, (num_episodes, copies)).mean(1)[:, None] * here for each in per_copy
        )
    return reward, kl


def anchor_kl(
    policy: DenoisingPolicy, episodes: TensorDict, plan: RolloutPlan, generator: torch.Generator
) -> Tensor:
    """The KL of the steps that the plan's gradients do not see, from one of them.

    Args:
        policy: the policy; its calls are counted.
        episodes: [B, K] of a rollout.
        plan: says which last steps are seen.
        generator: draws the step.

    Returns:
        [B, K] nats with its graph, 0 but for that step, and everywhere if all steps are seen.
    """
    num_episodes, num_steps = episodes.batch_size
    unseen = num_steps - plan.steps_in_sight(num_steps)
    device = generator.device
    if unseen == 0:
        return torch.zeros(num_episodes, num_steps, device=device)
    j = int(torch.randint(unseen, (1,), generator=generator, device=device))
    state = episodes[:, j].detach()
    prior_loc, control = state[keys.PRIOR_LOC], dict(state[keys.CONTROL].items())
    with torch.enable_grad():
        loc = policy.loc(state[keys.X], state[keys.STEP], control, prior_loc)
        policy.calls += num_episodes
        kl = gaussian.kl(loc, prior_loc, state[keys.SCALE])
        return unseen * kl[:, None] * (torch.arange(num_steps, device=device) == j)
