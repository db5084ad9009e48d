"""The regressions on weighted episodes, RWR and NFT, against closed forms."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from agent_tasks import make, noisy_drift
from batches import NO_CHAIN, first_batch, learn, prepared
from exact_tasks import gaussian_oracle, scales
from oracles import GaussianChainOracle
from torch import Tensor, nn

from ctrl_rl import keys
from ctrl_rl.agents.agent import Agent
from ctrl_rl.agents.nft import Nft
from ctrl_rl.agents.parts.advantages import condition_index
from ctrl_rl.agents.parts.noising import noisy_copies
from ctrl_rl.agents.rwr import RewardWeightedRegression
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import RolledChain, rollout
from ctrl_rl.learning.learner import Learner, TrainerConfig
from ctrl_rl.learning.replay import Replay, refresh
from ctrl_rl.policies import DenoisingPolicy, PriorPolicy

K, BATCHES, EPISODES = 4, 24, 4096


class Drifts(DenoisingPolicy):
    """loc = prior_loc + scale_k drift[label, k]; drifts [labels, K, d] in standard deviations."""

    def __init__(self, process: DenoisingProcess, drift: np.ndarray) -> None:
        super().__init__(process.kernel)
        self.drift = nn.Parameter(torch.as_tensor(drift).float())

    def mean(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        (label,) = control.values()
        return prior_loc + self.kernel.scale[step][..., None] * self.drift[label, step]


def oracles_of(process: DenoisingProcess) -> list[GaussianChainOracle]:
    return [gaussian_oracle(process, label) for label in range(3)]


def optimal_drifts(process: DenoisingProcess) -> np.ndarray:
    """sigma_k a_{k+1}: [labels, K, d]."""
    wide = scales(process)[:, None]
    return np.stack([oracle.optimal_shifts / wide for oracle in oracles_of(process)])


def drifts(process: DenoisingProcess, which: str) -> np.ndarray:
    """The prior's, the optimal, or others that are neither."""
    optimal = optimal_drifts(process)
    noise = 0.2 * np.random.default_rng(0).standard_normal(optimal.shape)
    return {"prior": 0 * optimal, "optimal": optimal, "other": 0.6 * optimal + noise}[which]


def gradients(process: DenoisingProcess, agent: Agent, drift: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean gradient in the drifts, per label, and its standard error: [labels, K, d] each."""
    rows, policy = [], Drifts(process, drift)
    for seed in range(BATCHES):
        env = LatentEnv(process, num_envs=EPISODES, seed=seed)
        losses = agent.loss(first_batch(env, policy, agent))
        (loss,) = (value for key, value in losses.items() if key.startswith("loss_"))
        (gradient,) = torch.autograd.grad(loss, policy.drift)
        rows.append(len(drift) * gradient)  # labels are equally frequent
    found = torch.stack(rows)
    return found.mean(0), found.std(0) / BATCHES**0.5


def z_score(found: tuple[Tensor, Tensor], exact: np.ndarray) -> float:
    mean, error = found
    return float(((mean - torch.as_tensor(exact)) / error).abs().max())


@pytest.fixture(scope="module")
def process() -> DenoisingProcess:
    return make("gaussian", 1, num_steps=K).process


# 24 figures with 23 degrees of freedom each: beyond 6 in less than one of 10^4 tests.
@pytest.mark.parametrize("rollouts", ["policy", "prior"])
@pytest.mark.parametrize("which", ["prior", "other"])
def test_rwr_gradient_is_that_of_the_kl_from_the_soft_optimum(rollouts, which, process):
    """p* has the optimal drift u*, so that d KL(p* || pi) / d u_k = u_k - u*_k."""
    drift = drifts(process, which)
    exact = drift - optimal_drifts(process)
    found = gradients(process, RewardWeightedRegression(rollouts=rollouts), drift)
    assert z_score(found, exact) < 6
    assert z_score(found, 0.8 * exact) > 10, "the comparison would see a fifth"


def test_rwr_gradient_is_zero_in_every_batch_of_the_optimum(process):
    """Weights there are e^{v_0(x_0)} / mean, and v_0 all but constant in this task."""
    agent, optimal = RewardWeightedRegression(), optimal_drifts(process)
    mean, error = gradients(process, agent, optimal)
    spread = max(oracle.start_law_term for oracle in oracles_of(process)) ** 0.5
    assert (mean.abs() < 6 * error).all()
    # Without the control variate the noise of a gradient is that of the mean of EPISODES / 3.
    plain = (3 / EPISODES / BATCHES) ** 0.5
    assert (error < 6 * max(spread, 1e-3) * plain).all()


def test_rwr_on_the_priors_episodes_has_its_zero_at_the_optimum(process):
    found = gradients(process, RewardWeightedRegression(rollouts="prior"), optimal_drifts(process))
    assert z_score(found, np.zeros(found[0].shape)) < 6
    assert found[1].max() < 0.02


@pytest.mark.parametrize("rollouts", ["policy", "prior"])
def test_rwr_weights_are_the_density_of_the_optimum_over_the_behaviour(rollouts):
    env = make("mixture2d", 64)
    policy = noisy_drift(env, "mixture2d")
    agent = RewardWeightedRegression(rollouts=rollouts)
    with torch.no_grad():
        episode = prepared(env, policy, agent)
    weight, index = episode["weight"][:, 0].double(), condition_index(episode)
    acted, prior, action = (
        episode[key].double() for key in (keys.BEHAVIOUR_LOC, keys.PRIOR_LOC, keys.ACTION)
    )
    normal, wide = torch.distributions.Normal, episode[keys.SCALE].double()[..., None]
    log_density = normal(prior, wide).log_prob(action) - normal(acted, wide).log_prob(action)
    exact = (episode[keys.NEXT_REWARD].double().sum((1, 2)) + log_density.sum((1, 2))).exp()
    for label in index.unique():
        mine = index == label
        assert weight[mine].mean() == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(
            weight[mine], exact[mine] / exact[mine].mean(), rtol=1e-3, atol=1e-5
        )
    sizes = [exact[index == label] for label in index]
    ess = torch.stack([e.sum() ** 2 / (len(e) * e.square().sum()) for e in sizes]).mean()
    assert float(agent.loss(episode)["ess"]) == pytest.approx(float(ess), rel=1e-3)


def test_rwr_survives_rewards_of_any_size(process):
    agent = RewardWeightedRegression()
    episode = rollout(make("gaussian", 30, num_steps=K), PriorPolicy(process.kernel))
    episode[keys.NEXT_REWARD] *= 1e4
    weight, index = agent.prepare(episode, NO_CHAIN)["weight"][:, 0], condition_index(episode)
    assert all(float(weight[index == label].mean()) == pytest.approx(1) for label in range(3))
    torch.testing.assert_close(weight.max(), torch.tensor(10.0))  # the best of ten has it all


class NftOracle:
    """Closed form of NFT for drifts on the gaussian task, one label.

    z = mean + sum_j reach_j noise_j + start_reach x_0 in every dimension, so that
    A = sum_j (u*_j - u_j) . noise_j + a_0 . x_0, and e_k = gain_k (z - mean) + offset_k + noise.
    """

    def __init__(self, process: DenoisingProcess, label: int) -> None:
        self.oracle = oracle = gaussian_oracle(process, label)
        kernel, steps = process.kernel, process.num_steps
        sigmas = oracle.sigmas
        products = np.append(np.cumprod(oracle.slopes[::-1])[::-1], 1.0)
        self.reach, self.start_reach = sigmas * products[1 : steps + 1], products[0]
        self.optimal = oracle.optimal_shifts / sigmas[:, None]
        signal, noise, clean = (
            table[:steps].double().numpy()
            for table in (kernel.signal.square(), kernel.noise_weight, kernel.denoised_weight)
        )
        # mean(x, z) - prior_loc(x) = pull (z - D(x)); D's slope from that of prior_loc
        self.pull = clean - noise * (signal / (1 - signal)) ** 0.5
        rest = kernel.sample_weight[:steps].double().numpy() + noise / (1 - signal) ** 0.5
        self.slope = (oracle.slopes[:steps] - rest) / self.pull
        self.level = oracle.offsets[:steps] / self.pull[:, None]
        self.root = signal**0.5
        self.gain = self.pull / sigmas * (1 - self.slope * self.root)

    def asked(self, drift: np.ndarray, consistency: float) -> np.ndarray:
        """E[(A + consistency) e_k] for drifts [K, d]: [K, d]."""
        oracle, mean = self.oracle, np.zeros_like(self.oracle.reward_weights)
        for k, sigma in enumerate(oracle.sigmas):
            mean = oracle.slopes[k] * mean + oracle.offsets[k] + sigma * drift[k]
        mean = oracle.slopes[-1] * mean + oracle.offsets[-1]
        covariance = self.reach @ (self.optimal - drift)
        covariance = covariance + self.start_reach * oracle.value_weights[0]
        estimate = (self.slope * self.root)[:, None] * mean + self.level
        offset = (self.pull / oracle.sigmas)[:, None] * (mean - estimate) - drift
        result: np.ndarray = self.gain[:, None] * covariance + consistency * offset
        return result

    def fixed_point(self, consistency: float) -> np.ndarray:
        """Drifts [K, d] at which `asked` is 0: it is affine in them."""
        zero = np.zeros_like(self.optimal)
        constant = self.asked(zero, consistency)
        columns = []
        for k in range(len(zero)):
            unit = zero.copy()
            unit[k] = 1.0  # dimensions do not mix and are alike
            columns.append((self.asked(unit, consistency) - constant)[:, 0])
        return np.linalg.solve(np.stack(columns, 1), -constant)


@pytest.mark.parametrize("consistency", [0.0, 0.5])
@pytest.mark.parametrize("which", ["prior", "optimal", "other"])
def test_nft_gradient_is_the_closed_form(which, consistency, process):
    drift = drifts(process, which)
    labels = range(len(drift))
    exact = -np.stack([NftOracle(process, y).asked(drift[y], consistency) for y in labels])
    agent = Nft(consistency=consistency, limit=100.0, beta=0.3)
    found = gradients(process, agent, drift)
    assert z_score(found, exact) < 6
    if which == "optimal" and consistency == 0:
        assert found[1].max() < 1e-3, "the advantage is 0 in every episode but for the start"
    else:
        assert z_score(found, 0.8 * exact) > 8, "the comparison would see a fifth"


def test_nft_without_consistency_leaves_the_chain_open(process):
    """All chains with the optimum's samples are fixed points, at any KL."""
    oracle = NftOracle(process, 0)
    other = np.zeros_like(oracle.optimal)
    other[0], other[-1] = oracle.reach[-1], -oracle.reach[0]  # no effect on the sample
    at_optimum = oracle.asked(oracle.optimal, 0.0)
    np.testing.assert_allclose(oracle.asked(oracle.optimal + 5 * other, 0.0), at_optimum)
    assert np.abs(oracle.asked(oracle.optimal + 5 * other, 0.2) - at_optimum).max() > 0.1


def test_nft_fixed_point_tends_to_the_soft_optimum_with_fine_steps():
    excess = []
    for steps in (64, 256, 512):
        oracle = NftOracle(make("gaussian", 1, num_steps=steps).process, 2)
        drift = oracle.fixed_point(consistency=0.2)
        assert np.abs(oracle.asked(drift, 0.2)).max() < 1e-9
        excess.append(((drift - oracle.optimal) ** 2).sum() / 2)  # nats short of the best J
    assert excess[0] > 4 * excess[1] > 8 * excess[2]
    assert excess[2] < 5e-3


@pytest.mark.parametrize("agent", ["nft", "rwr"])
def test_trained_drifts_reach_the_fixed_point(agent, process):
    built: Agent = RewardWeightedRegression()
    exact = optimal_drifts(process)
    if agent == "nft":
        built = Nft(consistency=0.5, limit=50.0)
        exact = np.stack([NftOracle(process, y).fixed_point(0.5) for y in range(3)])
        assert np.abs(exact - optimal_drifts(process)).max() > 0.1  # a fixed point of its own
    policy = Drifts(process, 0 * exact)
    config = TrainerConfig(
        updates=250, learning_rate={"network": 3e-2}, max_grad_norm=None, betas=(0.9, 0.99)
    )
    env = LatentEnv(process, num_envs=600)
    learn(env, Learner(policy, built, config), config.updates)
    assert policy.drift.detach().numpy() == pytest.approx(exact, abs=0.05)


def test_noisy_copies_follow_the_forward_process_and_its_posterior() -> None:
    n = 20_000
    env = make("mixture2d", n, num_steps=K)
    policy = noisy_drift(env, "mixture2d")
    called = policy.calls, env.process.prior_calls
    episode, chain = rollout(env, policy), RolledChain(env, policy)
    before = env.generator.get_state()
    copies, clean = noisy_copies(chain, episode), episode[keys.SAMPLE]  # latents are samples here
    spent = policy.calls - called[0], env.process.prior_calls - called[1]
    assert spent == (2 * K * n, (2 * K + 1) * n)
    signal = env.process.kernel.signal[:, None].square()
    here, following = signal[:K], signal[1 : K + 1]
    noise = (copies[keys.X] - here.sqrt() * clean) / (1 - here).sqrt()
    assert noise.mean((0, 2)).abs().max() < 5 / (2 * n) ** 0.5
    assert (noise.var((0, 2)) - 1).abs().max() < 5 * (1 / n) ** 0.5
    steps_apart = (noise[:, 1:] * noise[:, :-1]).mean((0, 2))
    assert steps_apart.abs().max() < 5 / (2 * n) ** 0.5, "noise of steps is independent"
    # Bayes: x_k = sqrt(ratio) x_{k+1} + noise, both around the same clean latent
    ratio = here / following
    gain = ratio.sqrt() * (1 - following) / (1 - here)
    posterior = following.sqrt() * clean + gain * (copies[keys.X] - here.sqrt() * clean)
    torch.testing.assert_close(copies[keys.ACTION], posterior, rtol=1e-3, atol=1e-4)

    env.generator.set_state(before)
    moved = Nft().prepare(episode, chain)
    again = refresh(policy, moved)
    torch.testing.assert_close(again[keys.LOC], copies[keys.BEHAVIOUR_LOC], rtol=1e-4, atol=1e-5)
    assert torch.equal(moved[keys.NEXT_REWARD], episode[keys.NEXT_REWARD])
    assert torch.equal(moved[keys.LOG_RATIO], episode[keys.LOG_RATIO])
    torch.testing.assert_close(
        env.process.prior_loc(copies[keys.X][:, 1], episode[keys.STEP][:, 1], {}),
        copies[keys.PRIOR_LOC][:, 1],
    )


@pytest.mark.parametrize("advantage", ["soft_return", "reward_over_std"])
def test_nft_loss_is_the_papers_and_its_gradient_what_it_asks_for(advantage, process):
    beta, limit, shift = 0.4, 1.0, 0.3
    agent = Nft(advantage=advantage, beta=beta, limit=limit, consistency=shift, epochs=2)
    env = LatentEnv(process, num_envs=60)
    policy = Drifts(process, drifts(process, "other"))
    episode = rollout(env, policy, plan=agent.plan)
    noised = agent.prepare(episode, RolledChain(env, policy))
    with torch.no_grad():
        policy.drift += 0.5
    batch = refresh(policy, noised)
    batch[keys.LOC].retain_grad()
    loss = agent.loss(batch)["loss_nft"]
    loss.backward()

    # By hand, as in the paper: two policies around the old one.
    reward, index = episode[keys.NEXT_REWARD].sum((1, 2)), condition_index(episode)
    value = reward - episode[keys.LOG_RATIO].sum(1) if advantage == "soft_return" else reward
    standing = torch.empty(60)
    for label in range(3):
        mine = value[index == label]
        spread = mine.std(correction=0) if advantage == "reward_over_std" else 1
        standing[index == label] = (mine - mine.mean()) / spread
    weight = ((standing + shift) / limit).clamp(-1, 1)
    assert 0.05 < float((weight.abs() == 1).float().mean()) < 0.95
    good = (1 + weight)[:, None, None] / 2
    old, new, target = (batch[key].detach() for key in (keys.BEHAVIOUR_LOC, keys.LOC, keys.ACTION))
    plus, minus = (1 - beta) * old + beta * new, (1 + beta) * old - beta * new
    wide = batch[keys.SCALE][..., None]
    squares = good * ((plus - target) / wide) ** 2 + (1 - good) * ((minus - target) / wide) ** 2
    exact = limit / (2 * beta) * squares.sum() / 60
    assert float(loss.detach()) == pytest.approx(float(exact), rel=1e-4)
    asked = limit * weight[:, None, None] * (target - old) / wide
    gradient = (beta * limit * (new - old) / wide - asked) / wide / 60
    torch.testing.assert_close(batch[keys.LOC].grad, gradient, rtol=1e-3, atol=1e-5)
    if advantage == "reward_over_std":
        assert float(agent.loss(batch)["advantage_std"]) == pytest.approx(1, abs=0.02)


AGENTS = {"rwr": RewardWeightedRegression, "nft": Nft}


@pytest.mark.parametrize("name", AGENTS)
def test_gradients_of_pieces_along_time_add_up(name, process):
    policy, totals = Drifts(process, drifts(process, "other")), []
    for chunks in (1, 3):
        agent = AGENTS[name](step_chunks=chunks)
        env = LatentEnv(process, num_envs=32, seed=5)
        episode = prepared(env, policy, agent)
        policy.drift.grad = None
        (pieces,) = Replay(agent.plan, env.generator).batches(episode, policy)
        for piece in pieces:
            agent.loss(piece)[f"loss_{name}"].backward()
        totals.append(policy.drift.grad)
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-3, atol=1e-5)
