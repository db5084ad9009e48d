"""SAC: what TorchRL's loss is fed with, against closed forms on the gaussian task."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from agent_tasks import StepShifts, make, noisy_drift, oracles, task_of
from batches import NO_CHAIN
from exact_tasks import ShiftPolicy
from running import contents, train
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.objectives import SACLoss, SoftUpdate

from ctrl_rl import gaussian, keys
from ctrl_rl.agents.parts.critics import ValueNetwork
from ctrl_rl.agents.plan import TaskSpec
from ctrl_rl.agents.sac import Sac, StepLaw
from ctrl_rl.cli.main import main
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.errors import ConfigError
from ctrl_rl.learning.replay import refresh
from ctrl_rl.policies import DenoisingPolicy, PriorPolicy

K = 6
PROCESS = make("gaussian", 1, K).process
TASK = task_of(PROCESS)


class PolicyValue(nn.Module):
    """Soft values v_k(x) = a_k . x + c_k under the soft optimum's drift times `factor`.

    Every later step that falls short of the optimum costs its KL to it, which moves c_k alone.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        weights, constants = [], []
        for oracle in oracles(PROCESS):
            short = (1 - factor) ** 2 * (oracle.optimal_shifts**2).sum(1) / (2 * oracle.sigmas**2)
            later = np.append(np.cumsum(short[::-1])[::-1], 0)
            weights.append(oracle.value_weights)
            constants.append(oracle.value_constants - later)
        self.weights = nn.Parameter(torch.as_tensor(np.stack(weights)).float())
        self.constants = nn.Parameter(torch.as_tensor(np.stack(constants)).float())

    def forward(self, x: Tensor, step: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        index = control["direction"], step
        return (self.weights[index] * x).sum(-1) + self.constants[index]


def random_value(task: TaskSpec) -> nn.Module:
    network = ValueNetwork(task, width=16)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return network


def agent_with(critic, **settings) -> Sac:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Sac(
            task=TASK, critic=critic, objective=SACLoss, target_update=SoftUpdate, **settings
        )


def policy_of(factor: float) -> StepShifts:
    policy = StepShifts(PROCESS)
    with torch.no_grad():
        policy.shifts.copy_(ShiftPolicy(PROCESS, factor).shifts)
    return policy


def stored(policy: DenoisingPolicy, behaviour: DenoisingPolicy, n=64, seed=0) -> TensorDict:
    """Episodes of another policy with the graph of `policy`, as replay serves them."""
    with torch.no_grad():
        episode = rollout(make("gaussian", n, K, seed), behaviour)
    return refresh(policy, episode)


def prior() -> DenoisingPolicy:
    return PriorPolicy(PROCESS.kernel)


def standard_scores(agent: Sac, policy: StepShifts, loss: str, module: nn.Module, batches=40):
    """Mean gradient over batches of the prior's episodes, in standard errors.

    What is 0 but for rounding, such as the critics' at the last step, stays below 1.
    """
    wanted, rows = [p for p in module.parameters() if p.requires_grad], []
    for seed in range(batches):
        found = agent.loss(stored(policy, prior(), n=256, seed=seed))[loss]
        gradients = torch.autograd.grad(found, wanted)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    rows = torch.stack(rows)
    error = rows.std(0) / batches**0.5
    return (rows.mean(0) / error.clamp(min=1e-3 * error.max())).abs().max()


# --- what TorchRL is handed -------------------------------------------------------------------


def test_law_is_the_density_relative_to_the_priors_step():
    episode = stored(noisy_drift(make("gaussian", 1, K), "gaussian"), prior()).detach()
    loc, scale, prior_loc = (episode[k] for k in (keys.LOC, keys.SCALE, keys.PRIOR_LOC))
    noise = torch.randn(loc.shape, generator=torch.Generator().manual_seed(0))
    law = StepLaw(loc, scale, prior_loc, gaussian.expand_to(scale, loc) * noise)
    action = law.rsample()
    wide = gaussian.expand_to(scale, loc).double()
    ours, priors = (
        torch.distributions.Normal(mean.double(), wide).log_prob(action.double()).sum(-1)
        for mean in (loc, prior_loc)
    )
    torch.testing.assert_close(law.log_prob(action).double(), ours - priors, rtol=1e-4, atol=1e-4)


class Asked(nn.Module):
    """A critic that remembers the latents and steps it was asked for."""

    def __init__(self, task: TaskSpec) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.zeros(()))
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, step: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        self.asked.append((x.detach(), step))
        return self.level.expand(step.shape)


def asked_of(batch: TensorDict) -> list[tuple[Tensor, Tensor]]:
    """What the critics were asked by one loss: for the target, for the fit, for the actor."""
    made: list[Asked] = []

    def critic(task: TaskSpec) -> nn.Module:
        made.append(Asked(task))
        return made[-1]

    agent_with(critic).loss(batch)
    return made[0].asked


def test_actions_are_random_draws_of_the_present_policy_at_the_next_step():
    batch = stored(policy_of(1.0), prior(), n=20_000)
    (target, target_step), (old, old_step), (new, new_step) = asked_of(batch)
    assert torch.equal(old, batch[keys.ACTION]) and torch.equal(old_step, batch[keys.STEP] + 1)
    assert torch.equal(new_step, old_step)
    # the actor's draw: spread of exactly one scale around the present mean, none of the old one
    noise = (new - batch[keys.LOC]) / batch[keys.SCALE][..., None]
    count = noise[:, 0].numel()
    assert (noise.mean((0, 2)).abs() < 5 / count**0.5).all()
    assert ((noise.square().mean((0, 2)) - 1).abs() < 5 * (2 / count) ** 0.5).all()
    # the target's: the same, one step on
    torch.testing.assert_close(target[:, :-1], new[:, 1:])
    assert torch.equal(target_step[:, :-1], new_step[:, 1:])


def test_own_episodes_are_their_own_draws():
    policy = policy_of(0.5)
    _, (old, _), (new, _) = asked_of(stored(policy, policy))
    torch.testing.assert_close(new, old)


def test_losses_are_sacs_equations():
    agent = agent_with(random_value)
    with torch.no_grad():  # the targets are networks of their own
        for value in agent.objective.target_qvalue_network_params.values(True, True):
            value.mul_(1.1)
    policy = noisy_drift(make("gaussian", 1, K), "gaussian")
    batch = stored(policy, prior())
    networks = []
    for part in ("qvalue_network_params", "target_qvalue_network_params"):
        for index in range(2):
            network = random_value(TASK)
            tensors = getattr(agent.objective, part).data[index]
            tensors["module", "critic"].to_module(network)
            networks.append(network)
    control = dict(batch[keys.CONTROL].items())
    new = batch[keys.LOC] + batch[keys.ACTION] - batch[keys.BEHAVIOUR_LOC]
    law = batch[keys.SCALE], batch[keys.PRIOR_LOC]
    ratio = gaussian.log_ratio(new, batch[keys.LOC], law[1], law[0])

    def values(network: nn.Module, x: Tensor) -> Tensor:
        return network(x, batch[keys.STEP] + 1, control)

    smallest = torch.minimum(*[values(network, new) for network in networks[:2]])
    actor = (ratio - smallest).mean()
    following = torch.minimum(*[values(network, new) for network in networks[2:]]) - ratio
    target = torch.cat([following[:, 1:], batch[keys.NEXT_REWARD][:, -1]], 1).detach()
    squared = [(values(n, batch[keys.ACTION]) - target).square().mean() for n in networks[:2]]
    result = agent.loss(batch)
    torch.testing.assert_close(result["loss_actor"], actor)
    torch.testing.assert_close(result["loss_qvalue"], sum(squared))
    torch.testing.assert_close(result["entropy"], -ratio.mean().detach())
    parameters = list(policy.parameters())
    found = torch.autograd.grad(result["loss_actor"], parameters, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(actor, parameters))
    nothing = torch.autograd.grad(result["loss_qvalue"], parameters, allow_unused=True)
    assert all(gradient is None for gradient in nothing), "critics teach the policy by values alone"


# --- closed forms -----------------------------------------------------------------------------


@pytest.mark.parametrize("critic", [random_value, lambda task: PolicyValue(0.5)])
def test_actor_gradient_is_that_of_kl_less_value_one_step_on(critic):
    """In the mean over actions; the one-sample KL and the closed form differ by noise alone."""
    agent, policy, network = agent_with(critic), policy_of(0.5), critic(TASK)
    params = agent.objective.qvalue_network_params.data
    params[1].update_(params[0])  # the smaller of two that are the same
    params[0]["module", "critic"].to_module(network)
    differences, sizes = [], []
    for seed in range(40):
        batch = stored(policy, prior(), n=256, seed=seed)
        noise = torch.randn(batch[keys.LOC].shape, generator=torch.Generator().manual_seed(seed))
        fresh = batch[keys.LOC] + batch[keys.SCALE][..., None] * noise
        value = network(fresh, batch[keys.STEP] + 1, dict(batch[keys.CONTROL].items()))
        exact = (batch[keys.KL] - value).mean()
        (one,) = torch.autograd.grad(
            agent.loss(batch)["loss_actor"], policy.shifts, retain_graph=True
        )
        (other,) = torch.autograd.grad(exact, policy.shifts)
        differences.append(one - other)
        sizes.append(other)
    difference = torch.stack(differences)
    error = difference.std(0) / len(difference) ** 0.5
    assert (difference.mean(0).abs() < 4.5 * error).all()
    assert (torch.stack(sizes).mean(0).abs() > 10 * error).any(), "the test could see a difference"


def test_critics_vanish_at_the_exact_soft_value_on_any_episodes():
    """log_ratio = v_{k+1} - v_k at the soft optimum, so that no target has noise."""
    agent = agent_with(lambda task: PolicyValue(1.0))
    result = agent.loss(stored(policy_of(1.0), prior()))
    assert result["loss_qvalue"] < 1e-8
    gradients = torch.autograd.grad(
        result["loss_qvalue"], [p for p in agent.parameters() if p.requires_grad]
    )
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-3
    wrong = agent_with(lambda task: PolicyValue(0.5)).loss(stored(policy_of(1.0), prior()))
    assert wrong["loss_qvalue"] > 1e-3


def test_critics_learn_the_value_of_the_policy_that_is():
    """Half the optimum's drift is worth less by its KL to it, on episodes of neither."""
    policy = policy_of(0.5)
    right, wrong = (agent_with(lambda task, f=f: PolicyValue(f)) for f in (0.5, 1.0))
    assert standard_scores(right, policy, "loss_qvalue", right) < 4.5
    assert standard_scores(wrong, policy, "loss_qvalue", wrong) > 10


def test_actor_rests_at_the_soft_optimum():
    agent, policy = agent_with(lambda task: PolicyValue(1.0)), policy_of(1.0)
    assert standard_scores(agent, policy, "loss_actor", policy) < 4.5
    short = policy_of(0.7)  # the same test sees less
    assert standard_scores(agent, short, "loss_actor", short) > 10


# --- critics and their targets ----------------------------------------------------------------


def test_critics_differ_and_targets_follow_once_per_rollout():
    agent = agent_with(random_value, target_rate=0.25)
    names = {name for name, _ in agent.named_parameters()}
    assert names and not any("target" in name for name in names)
    first = agent.objective.qvalue_network_params[
        "module", "critic", "perceptron", "first", "weight"
    ]
    assert (first[0] != first[1]).any()
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 1
    batch = stored(policy_of(0.5), prior())
    agent.loss(batch)
    agent.prepare(batch, NO_CHAIN)
    moved = 0
    for name, value in agent.state_dict().items():
        if "target_qvalue" in name and name.replace(".target_", ".") in names:
            torch.testing.assert_close(value, before[name] + 0.25)
            moved += 1
    assert moved == len(names)


def test_resumed_is_uninterrupted(tmp_path):
    """Critics, targets and past episodes come back to the bit, and nothing is drawn elsewhere."""
    words = ["agent=sac", "agent.replay=40"]
    torch.manual_seed(1)
    whole = train(tmp_path, "whole", *words)
    expected = contents(whole)
    torch.manual_seed(2)
    assert main(["train", f"resume={whole}", "checkpoint=5"]) == 0
    assert contents(whole) == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_critics": 1}, "agent.num_critics=1 must be 2 or more"),
        ({"target_rate": 0.0}, "agent.target_rate=0.0 must be > 0"),
        ({"target_rate": 1.5}, "agent.target_rate=1.5 must be > 0 and at most 1"),
        ({"replay": -1}, "agent.replay=-1"),
    ],
)
def test_settings_are_checked(setting, message):
    with pytest.raises(ConfigError, match=message):
        agent_with(random_value, **setting)
