"""The policy-gradient agents: their estimators, the clip, and what they reuse a rollout for."""

from collections.abc import Callable, Mapping

import pytest
import torch
from batches import NO_CHAIN, first_batch, prepared
from tensordict import TensorDict
from torch import Tensor, nn

from ctrl_rl import gaussian, keys
from ctrl_rl.agents.agent import Agent
from ctrl_rl.agents.parts.advantages import clipped_surrogate
from ctrl_rl.conditions import label_counts
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.errors import ConfigError
from ctrl_rl.learning.replay import Replay
from ctrl_rl.policies import DenoisingPolicy
from ctrl_rl.runs.build import build_agent, build_process
from ctrl_rl.runs.compose import compose

# The last word: GAE is unbiased for any critic only without bootstrapping.
UNBIASED = {
    "reinforce": ["agent=reinforce"],
    "ppo": ["agent=ppo"],
    "ppo_critic": ["agent=ppo_critic", "agent.gae_lambda=1"],
    "grpo": ["agent=grpo"],
    "dpok": ["agent=dpok"],
}
STEPS, BATCHES, EPISODES = 4, 32, 2048


class AffinePolicy(DenoisingPolicy):
    """A drift of few parameters, bias[y, k] + weight[k] x, away from the prior.

    The KL of a step depends on the latent, so that actions change the KLs that follow.
    """

    def __init__(self, process: DenoisingProcess) -> None:
        super().__init__(process.kernel)
        ((self.control, labels),) = label_counts(process.controls).items()
        generator = torch.Generator().manual_seed(0)
        shape = (labels, process.num_steps, *process.shape)
        self.bias = nn.Parameter(0.3 * torch.randn(shape, generator=generator))
        self.weight = nn.Parameter(0.3 * torch.randn(process.num_steps, generator=generator))

    def mean(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        drift = self.bias[control[self.control], step] + self.weight[step][:, None] * x
        return prior_loc + self.kernel.scale[step][:, None] * drift


@pytest.fixture(scope="module")
def process() -> DenoisingProcess:
    return build_process(compose("train", ["env=gaussian", f"kernel.num_steps={STEPS}"]))


def agent_of(process: DenoisingProcess, *words: str) -> Agent:
    """An agent of the gaussian task, its critic with random weights where it has one."""
    agent = build_agent(compose("train", ["env=gaussian", *words]), process)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return agent


def policy_loss(agent: Agent, batch: TensorDict) -> Tensor:
    (name,) = [k for k in agent.loss(batch).keys() if k.startswith("loss_") and k != "loss_critic"]
    return agent.loss(batch)[name]


def gradients(
    process: DenoisingProcess,
    agent: Agent,
    loss: Callable[[Agent, TensorDict], Tensor] = policy_loss,
    seed: int = 0,
) -> Tensor:
    """Gradients of independent batches: [BATCHES, parameters]."""
    policy, rows = AffinePolicy(process), []
    for batch in range(BATCHES):
        env = LatentEnv(process, num_envs=EPISODES, seed=seed + batch)
        part = first_batch(env, policy, agent)
        found = torch.autograd.grad(loss(agent, part), list(policy.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def pathwise(process: DenoisingProcess) -> Tensor:
    return gradients(process, agent_of(process, "agent=ctrl"), seed=1000)


def worst(one: Tensor, other: Tensor) -> float:
    """Largest difference of two means in standard errors."""
    error = (one.var(0) + other.var(0)).div(BATCHES).sqrt()
    return float(((one.mean(0) - other.mean(0)) / error).abs().max())


@pytest.mark.parametrize("name", UNBIASED)
def test_gradient_is_the_pathwise_gradient_of_the_soft_return(name, process, pathwise):
    # 28 parameters, 62 degrees of freedom: beyond 6 in less than one of 10^5 tests.
    assert worst(gradients(process, agent_of(process, *UNBIASED[name])), pathwise) < 6


def without_direct_kl(agent: Agent, batch: TensorDict) -> Tensor:
    return policy_loss(agent, batch) - batch[keys.KL].sum(1).mean()


def score_over_dimensions(agent: Agent, batch: TensorDict) -> Tensor:
    kl = batch[keys.KL].sum(1).mean()
    return kl + (policy_loss(agent, batch) - kl) / batch[keys.X][0, 0].numel()


def without_later_kl(agent: Agent, batch: TensorDict) -> Tensor:
    kl = batch[keys.KL].detach()
    later = kl.flip(1).cumsum(1).flip(1) - kl
    charged = later * batch[keys.ACTION_LOG_PROB]
    return policy_loss(agent, batch) - charged.sum(1).mean()


@pytest.mark.parametrize("wrong", [without_direct_kl, score_over_dimensions, without_later_kl])
def test_the_comparison_sees_what_is_missing(wrong, process, pathwise):
    agent = agent_of(process, "agent=reinforce")
    assert worst(gradients(process, agent, wrong), pathwise) > 10


def test_grpo_over_the_standard_deviation_has_another_objective(process, pathwise):
    agent = agent_of(process, "agent=grpo", "agent.advantage=reward_over_std")
    assert worst(gradients(process, agent), pathwise) > 10


def test_closed_form_kl_is_the_mean_log_ratio(process):
    with torch.no_grad():
        episode = rollout(LatentEnv(process, num_envs=50_000), AffinePolicy(process))
    difference = episode[keys.LOG_RATIO] - episode[keys.KL]
    error = difference.std(0) / len(difference) ** 0.5
    assert (difference.mean(0).abs() < 5 * error).all()
    assert (episode[keys.KL].mean(0) > 20 * error).all()  # a KL of 0 would not pass


def test_surrogate_has_reinforces_gradient_where_nothing_was_learned(process):
    policy = AffinePolicy(process)
    once = ["agent.epochs=1", "agent.minibatches=1"]
    found = []
    for words in (["agent=reinforce"], ["agent=ppo", *once]):
        batch = first_batch(
            LatentEnv(process, num_envs=64, seed=3), policy, agent := agent_of(process, *words)
        )
        gradient = torch.autograd.grad(policy_loss(agent, batch), list(policy.parameters()))
        found.append(torch.cat([g.flatten() for g in gradient]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def moved(dims: int, clip: float) -> TensorDict:
    """Steps whose policy has moved by random amounts around the clip's range, and advantages."""
    generator = torch.Generator().manual_seed(0)
    behaviour_loc, noise = torch.randn(2, 256, 3, dims, generator=generator)
    scale = 0.5 + torch.rand(256, 3, generator=generator)
    # log pi - log pi_b = shift . noise / scale - ..., of the size of clip per dimension
    shift = 3 * clip * scale[..., None] * noise * torch.randn(256, 3, 1, generator=generator)
    return TensorDict(
        {
            keys.ACTION: behaviour_loc + scale[..., None] * noise,
            keys.LOC: (behaviour_loc + shift).requires_grad_(),
            keys.BEHAVIOUR_LOC: behaviour_loc,
            keys.SCALE: scale,
            "advantage": torch.randn(256, 3, generator=generator),
        },
        batch_size=[256, 3],
    )


@pytest.mark.parametrize("dims", [1, 7])
def test_clip_stops_the_gradient_exactly_outside_of_its_range(dims):
    clip = 0.1
    batch = moved(dims, clip)
    loc, advantage = batch[keys.LOC], batch["advantage"]
    surrogate, figures = clipped_surrogate(batch, advantage, clip)
    (gradient,) = torch.autograd.grad(surrogate.sum(), loc)

    log_prob = gaussian.log_prob(batch[keys.ACTION], loc, batch[keys.SCALE])
    (score,) = torch.autograd.grad(log_prob.sum(), loc)
    before = gaussian.log_prob(batch[keys.ACTION], batch[keys.BEHAVIOUR_LOC], batch[keys.SCALE])
    ratio = ((log_prob - before) / dims).exp().detach()
    gained = ((advantage > 0) & (ratio > 1 + clip)) | ((advantage < 0) & (ratio < 1 - clip))
    assert 0.1 < gained.float().mean() < 0.9  # both sides occur
    expected = torch.where(gained, 0, advantage * ratio)[..., None] * score
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    assert figures["clip_fraction"] == gained.float().mean()
    kl = gaussian.kl(loc, batch[keys.BEHAVIOUR_LOC], batch[keys.SCALE]).mean()
    torch.testing.assert_close(figures["behaviour_kl"], kl.detach())


@pytest.mark.parametrize("name", ["ppo", "ppo_critic", "grpo", "dpok"])
def test_minibatches_start_at_a_ratio_of_one_and_leave_it(name, process):
    words = ["agent.epochs=2", "agent.minibatches=3", "agent.step_chunks=2"]
    agent, policy = agent_of(process, f"agent={name}", *words), AffinePolicy(process)
    env = LatentEnv(process, num_envs=12)
    episode = prepared(env, policy, agent)
    seen = 0
    for pieces in Replay(agent.plan, env.generator).batches(episode, policy):
        for piece in pieces:
            seen += 1
            ratio = [piece[k] for k in (keys.ACTION, keys.LOC, keys.BEHAVIOUR_LOC, keys.SCALE)]
            assert gaussian.log_ratio(*ratio).abs().max() < 1e-5
            assert agent.loss(piece)["behaviour_kl"] < 1e-10
    assert seen == 2 * 3 * 2
    for pieces in Replay(agent.plan, env.generator).batches(episode, policy):
        with torch.no_grad():
            policy.bias += 0.1
        assert agent.loss(next(pieces))["behaviour_kl"] > 1e-3


@pytest.mark.parametrize("name", ["ppo", "ppo_critic", "grpo", "dpok"])
def test_gradients_of_pieces_along_time_add_up(name, process):
    policy, totals = AffinePolicy(process), []
    for chunks in (1, 3):
        words = ["agent.epochs=1", "agent.minibatches=1", f"agent.step_chunks={chunks}"]
        agent = agent_of(process, f"agent={name}", *words)
        env = LatentEnv(process, num_envs=32, seed=5)
        episode = prepared(env, policy, agent)
        trained = [*policy.parameters(), *agent.parameters()]
        for parameter in trained:
            parameter.grad = None
        (pieces,) = Replay(agent.plan, env.generator).batches(episode, policy)
        for piece in pieces:
            losses = agent.loss(piece)
            sum(losses[key] for key in losses.keys() if key.startswith("loss_")).backward()
        totals.append([parameter.grad for parameter in trained])
    assert all(gradient is not None for gradient in totals[0])
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-3, atol=1e-5)


def test_grpo_over_the_standard_deviation_ignores_the_unit_of_the_reward(process):
    """Why it has no temperature of its own: a reward of other units gives the same advantages."""
    agent = agent_of(process, "agent=grpo", "agent.advantage=reward_over_std")
    soft = agent_of(process, "agent=grpo")
    episode = rollout(LatentEnv(process, num_envs=64), AffinePolicy(process))
    larger = episode.clone()
    larger[keys.NEXT_REWARD] *= 10
    one, other = (agent.prepare(each, NO_CHAIN)["advantage"] for each in (episode, larger))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    one, other = (soft.prepare(each, NO_CHAIN)["advantage"] for each in (episode, larger))
    assert (one - other).abs().max() > 1


@pytest.mark.parametrize(
    ("agent", "word"),
    [
        ("ppo", "clip=-1"),
        ("ppo", "gae_lambda=2"),
        ("grpo", "clip=1"),
        ("dpok", "clip=0"),
        ("ppo", "epochs=0"),
        ("grpo", "advantage=reward"),
        ("dpok", "critic.width=0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(agent, word, process):
    with pytest.raises(ConfigError, match=f"agent.{word.partition('=')[0]}"):
        agent_of(process, f"agent={agent}", f"agent.{word}")
