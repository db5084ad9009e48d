"""TB, VarGrad, DB, SubTB and PCL against closed forms, and against each other."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from exact_tasks import ShiftPolicy, gaussian_oracle
from torch import Tensor, nn

from ctrl_rl import keys
from ctrl_rl.agents.agent import Agent
from ctrl_rl.agents.db import DetailedBalance
from ctrl_rl.agents.parts.advantages import condition_index, leave_one_out_mean
from ctrl_rl.agents.parts.critics import ValueNetwork, state_values
from ctrl_rl.agents.parts.returns import episode_log_ratio, episode_reward
from ctrl_rl.agents.pcl import PathConsistency
from ctrl_rl.agents.plan import RolloutPlan, TaskSpec
from ctrl_rl.agents.subtb import SubtrajectoryBalance
from ctrl_rl.agents.tb import TrajectoryBalance
from ctrl_rl.agents.vargrad import VarGrad
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.errors import ConfigError
from ctrl_rl.learning.learner import Learner
from ctrl_rl.learning.replay import refresh
from ctrl_rl.policies import DenoisingPolicy, PriorPolicy
from ctrl_rl.runs import build
from ctrl_rl.runs.compose import compose

# Noise that ends early, so that the start shows in the sample and v_0 varies with x_0.
WORDS = ["env=gaussian", "+prior.scheduler.beta_end=0.005"]
PROCESS = build.build_process(compose("train", WORDS))
K = PROCESS.num_steps
TASK = TaskSpec(shape=PROCESS.shape, num_steps=K, controls=dict(PROCESS.controls))
ORACLES = [gaussian_oracle(PROCESS, label) for label in range(PROCESS.controls["direction"].size)]
SCORE = RolloutPlan(gradients="score")


class TrainableShift(ShiftPolicy):
    """The closed-form optimum with parameters: its shifts, and a slope in x that is 0 there."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__(PROCESS, factor)
        self.shifts = nn.Parameter(self.shifts)
        self.slopes = nn.Parameter(torch.zeros(K))

    def mean(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        return super().mean(x, step, control, prior_loc) + self.slopes[step][:, None] * x


class ClosedFormValue(nn.Module):
    """v_k(x) = a_k . x + c_k of every label, as parameters."""

    def __init__(self, task: TaskSpec) -> None:
        super().__init__()
        weights = np.stack([oracle.value_weights for oracle in ORACLES])
        constants = np.stack([oracle.value_constants for oracle in ORACLES])
        self.weights = nn.Parameter(torch.as_tensor(weights).float())
        self.constants = nn.Parameter(torch.as_tensor(constants).float())

    def forward(self, x: Tensor, step: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        index = control["direction"], step
        return (self.weights[index] * x).sum(-1) + self.constants[index]


class ConstantValue(nn.Module):
    def __init__(self, task: TaskSpec) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor, step: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        return self.constant.expand(step.shape)


def random_value(task: TaskSpec) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = ValueNetwork(task, width=16)
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return network


def tb(log_z: float | list[float]) -> TrajectoryBalance:
    """TB with given numbers log Z, by label; the null label's is 0."""
    agent = TrajectoryBalance(task=TASK)
    with torch.no_grad():
        agent.log_z.network.table.weight[: len(ORACLES), 0] = torch.as_tensor(log_z)
    return agent


def episodes(policy: DenoisingPolicy, behaviour: DenoisingPolicy | None = None, n=64, seed=0, **k):
    """Episodes with the policy's graph; of its own, or of another policy."""
    env = LatentEnv(PROCESS, num_envs=n, seed=seed)
    if behaviour is None:
        return rollout(env, policy, plan=SCORE, **k)
    return refresh(policy, rollout(env, behaviour, **k))


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    wanted = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]


def close(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-4) -> None:
    size = max(float(each.abs().max()) for each in expected)
    assert size > 0
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * size)


def loss_of(agent: Agent, batch) -> Tensor:
    (loss,) = [v for key, v in agent.loss(batch).items() if str(key).startswith("loss_")]
    return loss


def values_and_log_ratios(agent, batch) -> tuple[Tensor, Tensor]:
    """Values [B, K + 1] with the reward last, and log-ratios [B, K], for explicit loops."""
    values = state_values(agent.critic, batch)
    return torch.cat([values, episode_reward(batch)[:, None]], 1), batch[keys.LOG_RATIO]


def residual(values: Tensor, log_ratio: Tensor, i: int, j: int) -> Tensor:
    return values[:, i] + log_ratio[:, i:j].sum(1) - values[:, j]


WITH_VALUES = {
    "db": lambda critic: DetailedBalance(task=TASK, critic=critic),
    "subtb": lambda critic: SubtrajectoryBalance(task=TASK, critic=critic),
    "pcl_1": lambda critic: PathConsistency(task=TASK, critic=critic, path_length=1),
    "pcl_3": lambda critic: PathConsistency(task=TASK, critic=critic, path_length=3),
    "pcl_whole": lambda critic: PathConsistency(task=TASK, critic=critic),
}

# --- at the closed-form optimum ---------------------------------------------------------------


@pytest.mark.parametrize("whose", ["own", "prior"])
@pytest.mark.parametrize("name", WITH_VALUES)
def test_loss_and_gradients_vanish_at_the_optimum_on_any_episodes(name, whose):
    agent = WITH_VALUES[name](ClosedFormValue)
    sizes, worst = [], []
    for factor in (1.0, 0.9):
        policy = TrainableShift(factor)
        behaviour = PriorPolicy(PROCESS.kernel) if whose == "prior" else None
        loss = loss_of(agent, episodes(policy, behaviour))
        sizes.append(loss.item())
        both = gradients(loss, policy) + gradients(loss, agent)
        worst.append(max(float(gradient.abs().max()) for gradient in both))
    assert sizes[0] < 1e-8 < 1e-4 < sizes[1]
    assert worst[0] < 1e-3 * worst[1]


def test_what_tb_and_vargrad_leave_at_the_optimum_is_the_value_of_the_start():
    """log Z_y + sum_k log_ratio_k - r = log Z_y - v_0(x_0), to rounding."""
    batch = episodes(TrainableShift(), n=20_000)
    left = episode_reward(batch) - episode_log_ratio(batch)
    value = state_values(ClosedFormValue(TASK), batch)[:, 0]
    torch.testing.assert_close(left, value, rtol=1e-4, atol=1e-4)
    # Half the variance of v_0(x_0) = a_0 . x_0 + c_0 is the start law's part of log Z.
    expected = np.mean([oracle.start_law_term for oracle in ORACLES])
    best = tb([oracle.optimal_soft_return for oracle in ORACLES])
    assert loss_of(best, batch).item() == pytest.approx(expected, rel=0.05)
    assert loss_of(VarGrad(), batch).item() == pytest.approx(expected, rel=0.05)


def standard_scores(agent: Agent, policy: TrainableShift, behaviour=None) -> Tensor:
    """Mean gradient over 100 batches, in standard errors, of every parameter of the policy."""
    found = []
    for seed in range(100):
        batch = episodes(policy, behaviour, n=256, seed=seed)
        parts = gradients(loss_of(agent, batch), policy)
        found.append(torch.cat([part.flatten() for part in parts]))
    all_of_them = torch.stack(found)
    return all_of_them.mean(0) / (all_of_them.std(0) / len(found) ** 0.5)


@pytest.mark.parametrize("log_z", ["optimal_soft_return", "log_z", None])
def test_expected_gradient_of_tb_is_0_at_the_optimum_for_every_log_z(log_z):
    values = [getattr(oracle, log_z) if log_z else 0.0 for oracle in ORACLES]
    assert standard_scores(tb(values), TrainableShift()).abs().max() < 4.5


def test_other_policies_episodes_bias_tb_through_the_start_but_not_pcl():
    policy, prior = TrainableShift(), PriorPolicy(PROCESS.kernel)
    agent = tb([oracle.optimal_soft_return for oracle in ORACLES])
    *_, slopes = standard_scores(agent, policy, prior).split([policy.shifts.numel(), K])
    assert slopes.abs().max() > 10  # the slope in x tells starts apart
    pcl = WITH_VALUES["pcl_whole"](ClosedFormValue)
    loss = loss_of(pcl, episodes(policy, prior))
    assert loss < 1e-8


# --- the policy gradient ----------------------------------------------------------------------


@pytest.mark.parametrize("baseline", [0.0, 2.5])
def test_tb_is_the_policy_gradient_with_a_one_sample_kl(baseline):
    """With L = sum_k log_ratio_k and S = grad sum_k log pi(a_k|s_k) = grad L, on one batch:

    TB with log Z = b is (b + L - r) S, the score-function estimate of -grad E[r - L] with baseline
    b; the direct term grad L, of mean 0, is that of a baseline lower by 1.
    """
    policy = TrainableShift(0.5)
    batch = episodes(policy)
    found = gradients(loss_of(tb(baseline), batch), policy)
    log_prob, log_ratio = batch[keys.ACTION_LOG_PROB].sum(1), episode_log_ratio(batch)
    soft_return = (episode_reward(batch) - log_ratio).detach()
    close(found, gradients(-((soft_return - baseline) * log_prob).mean(), policy))
    score = -((soft_return - (baseline - 1)) * log_prob).mean()
    close(found, gradients(score + log_ratio.mean(), policy))


def test_best_log_z_of_a_batch_is_its_mean_soft_return():
    batch = episodes(TrainableShift(0.5), control={"direction": 1})
    mean = (episode_reward(batch) - episode_log_ratio(batch)).mean().item()
    agent = tb(mean)
    assert max(g.abs().max() for g in gradients(loss_of(agent, batch), agent)) < 1e-5


def test_vargrad_is_tb_with_the_batch_mean_for_log_z():
    n = 16
    policy = TrainableShift(0.5)
    batch = episodes(policy, n=n, control={"direction": 1})
    log_weight = (episode_reward(batch) - episode_log_ratio(batch)).detach()
    loss = loss_of(VarGrad(), batch)
    assert loss.item() == pytest.approx(log_weight.var().item() / 2, rel=1e-5)
    tb_gradients = gradients(loss_of(tb(log_weight.mean().item()), batch), policy)
    close(gradients(loss, policy), [n / (n - 1) * gradient for gradient in tb_gradients])


def test_vargrad_is_the_policy_gradient_with_a_leave_one_out_baseline():
    policy = TrainableShift(0.5)
    label = torch.tensor([0] * 2 + [1] * 5 + [2] * 9)
    batch = episodes(policy, n=16, control={"direction": label})
    log_weight = (episode_reward(batch) - episode_log_ratio(batch)).detach()
    advantage = log_weight - leave_one_out_mean(log_weight, condition_index(batch))
    score = (advantage * batch[keys.ACTION_LOG_PROB].sum(1)).mean()
    close(gradients(loss_of(VarGrad(), batch), policy), gradients(-score, policy))


def test_vargrad_learns_nothing_from_a_control_with_one_episode():
    policy = TrainableShift(0.5)
    batch = episodes(policy, n=4, control={"direction": torch.tensor([0, 1, 1, 2])})
    result = VarGrad().loss(batch)
    assert result["alone"] == 0.5
    shifts, slopes = gradients(result["loss_vargrad"], policy)
    assert not shifts[[0, 2]].any() and shifts[1].any()
    alone = VarGrad().loss(batch[[0, 1, 3]])
    assert alone["loss_vargrad"] == 0 and alone["alone"] == 1


# --- relations --------------------------------------------------------------------------------


def test_db_and_pcl_of_one_step_are_the_same_loss():
    policy = TrainableShift(0.5)
    batch = episodes(policy)
    db, pcl = WITH_VALUES["db"](random_value), WITH_VALUES["pcl_1"](random_value)
    values, log_ratio = values_and_log_ratios(db, batch)
    expected = sum(residual(values, log_ratio, k, k + 1).square().mean() for k in range(K)) / 2
    for agent in (db, pcl):
        loss = loss_of(agent, batch)
        torch.testing.assert_close(loss, expected)
        close(gradients(loss, policy), gradients(expected, policy))
        close(gradients(loss, agent), gradients(loss_of(db, batch), db))
    close(gradients(loss_of(db, batch), db), gradients(expected, db))


def test_pcl_sums_over_all_paths_of_its_length():
    policy = TrainableShift(0.5)
    batch, agent = episodes(policy), WITH_VALUES["pcl_3"](random_value)
    values, log_ratio = values_and_log_ratios(agent, batch)
    squared = [residual(values, log_ratio, i, i + 3).square().mean() for i in range(K - 2)]
    torch.testing.assert_close(loss_of(agent, batch), sum(squared) / 2)


def test_pcl_of_the_whole_path_is_tb_where_the_value_of_the_start_is_log_z():
    policy = TrainableShift(0.5)
    batch, agent = episodes(policy), WITH_VALUES["pcl_whole"](ConstantValue)
    loss, expected = loss_of(agent, batch), loss_of(tb(1.3), batch)
    torch.testing.assert_close(loss, expected)
    close(gradients(loss, policy), gradients(expected, policy))


@pytest.mark.parametrize("decay", [0.7, 1.0])
def test_subtb_is_the_weighted_mean_over_all_paths(decay):
    policy = TrainableShift(0.5)
    batch = episodes(policy)
    agent = SubtrajectoryBalance(task=TASK, critic=random_value, decay=decay)
    values, log_ratio = values_and_log_ratios(agent, batch)
    pairs = [(i, j) for i in range(K) for j in range(i + 1, K + 1)]
    total = sum(decay ** (j - i) for i, j in pairs)
    parts = (decay ** (j - i) * residual(values, log_ratio, i, j).square().mean() for i, j in pairs)
    expected = sum(parts, torch.zeros(())) / total / 2
    loss = loss_of(agent, batch)
    torch.testing.assert_close(loss, expected)
    for module in (policy, agent):
        close(gradients(loss, module), gradients(expected, module), rtol=1e-3)


@pytest.mark.parametrize(("decay", "limit", "factor"), [(1e-9, "db", K), (1e9, "pcl_whole", 1)])
def test_limits_of_subtb(decay, limit, factor):
    batch = episodes(TrainableShift(0.5))
    agent = SubtrajectoryBalance(task=TASK, critic=random_value, decay=decay)
    other = loss_of(WITH_VALUES[limit](random_value), batch)
    torch.testing.assert_close(factor * loss_of(agent, batch), other)


def test_settings_are_checked():
    for length in (0, K + 1):
        with pytest.raises(ConfigError, match=f"agent.path_length={length} must be 1 to {K}"):
            PathConsistency(task=TASK, critic=ConstantValue, path_length=length)
    for decay in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=f"agent.decay={decay} must be > 0"):
            SubtrajectoryBalance(task=TASK, critic=ConstantValue, decay=decay)
    with pytest.raises(ConfigError, match="agent.replay=-1"):
        TrajectoryBalance(task=TASK, replay=-1)


# --- learning off the policy ------------------------------------------------------------------


@torch.no_grad()
def divergence_from_the_optimum(policy: DenoisingPolicy) -> float:
    """KL(pi || pi*) over the policy's own paths, nats: what J is short of its optimum."""
    batch = episodes(policy, n=4096, seed=1)
    best = torch.as_tensor(np.stack([oracle.optimal_shifts for oracle in ORACLES])).float()
    shift = best[batch[keys.CONTROL, "direction"], batch[keys.STEP]]
    missing = batch[keys.LOC] - batch[keys.PRIOR_LOC] - shift
    return float((missing.square().sum(-1) / (2 * batch[keys.SCALE] ** 2)).sum(1).mean())


@pytest.mark.parametrize("path_length", ["1", "null"])
def test_pcl_learns_the_optimal_drift_from_episodes_of_the_prior_alone(path_length):
    """To 0.02 nats of KL(pi || pi*); the prior itself is 1.09 nats away."""
    config = compose("train", [*WORDS, "agent=pcl", f"agent.path_length={path_length}"])
    settings = build.build_trainer_config(config)
    policy, agent = build.build_policy(config, PROCESS), build.build_agent(config, PROCESS)
    learner = Learner(policy, agent, settings)
    kept = episodes(policy, PriorPolicy(PROCESS.kernel), n=4096).detach()
    generator = torch.Generator().manual_seed(0)
    for update in range(300):
        batch = kept[torch.randint(len(kept), (256,), generator=generator)]
        learner.backward(agent.loss(refresh(policy, batch)))
        learner.step(round(update * settings.updates / 300))
    assert divergence_from_the_optimum(policy) < 0.02
