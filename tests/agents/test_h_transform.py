"""The learned h-transform: exact values are its fixed point, its gradient is that of J."""

from collections.abc import Mapping

import pytest
import torch
from agent_tasks import StepShifts, make, noisy_drift, oracles, task_of
from batches import first_batch, prepared
from torch import Tensor, nn

from ctrl_rl import keys
from ctrl_rl.agents.agent import Phase
from ctrl_rl.agents.ctrl import Ctrl
from ctrl_rl.agents.h_transform import HTransform
from ctrl_rl.agents.parts.critics import ConditionValues
from ctrl_rl.agents.plan import TaskSpec, in_force
from ctrl_rl.conditions import joint_place, label_counts
from ctrl_rl.controls import Categorical
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.rollout import RolledChain, rollout
from ctrl_rl.errors import ConfigError
from ctrl_rl.networks.convolutional import StepwiseEncoder
from ctrl_rl.policies import DenoisingPolicy

K, BATCHES = 4, 32


class ExactValues(nn.Module):
    """v_k(x) of the gaussian task in closed form, plus errors in slope and constant to learn."""

    def __init__(self, process: DenoisingProcess) -> None:
        super().__init__()
        found = oracles(process)
        slopes = torch.stack([torch.as_tensor(o.value_weights) for o in found], -1)
        constants = torch.stack([torch.as_tensor(o.value_constants) for o in found], -1)
        self.register_buffer("slopes", slopes.float())  # [K + 1, d, C]
        self.register_buffer("constants", constants.float())  # [K + 1, C]
        self.error = nn.Parameter(torch.zeros_like(self.constants))
        self.tilt = nn.Parameter(torch.zeros_like(self.slopes))

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        slope = self.slopes[step] + self.tilt[step]
        values = (x[..., None] * slope).sum(-2) + self.constants[step] + self.error[step]
        return torch.cat([values.logsumexp(-1, keepdim=True), values], -1)


def exact_agent(process: DenoisingProcess) -> HTransform:
    """The agent with exact values, its constant c left at 0."""
    agent = HTransform(
        task=task_of(process),
        critic=lambda task: ExactValues(process),
        value_minibatches=1,
        minibatches=1,
    )
    agent.started.fill_(True)  # past the first update, which would set c
    return agent


def mean_gradients(
    phase: Phase, policy: DenoisingPolicy, loss: str, parameters: list[nn.Parameter]
) -> tuple[Tensor, Tensor]:
    """Mean gradient over independent batches, and its standard error."""
    rows = []
    for batch in range(BATCHES):
        part = first_batch(make("gaussian", 2048, K, seed=batch), policy, phase)
        found = torch.autograd.grad(phase.loss(part)[loss], parameters)
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    stacked = torch.stack(rows).double()
    return stacked.mean(0), stacked.std(0) / BATCHES**0.5


def moved(process: DenoisingProcess) -> StepShifts:
    policy = StepShifts(process)
    with torch.no_grad():
        shape, generator = policy.shifts.shape, torch.Generator().manual_seed(0)
        policy.shifts.copy_(0.3 * torch.randn(shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def process() -> DenoisingProcess:
    return make("gaussian", 1, K).process


def worst(mean: Tensor, error: Tensor) -> float:
    """Largest mean in standard errors, where more than rounding is random."""
    return float((mean.abs() / error)[error > 1e-7].max())


def test_exact_values_are_where_the_regression_ends(process: DenoisingProcess) -> None:
    """Its mean gradient is 0 at E_ref[e^r | x_k], and not where values are off by half a nat."""
    agent, policy = exact_agent(process), StepShifts(process)
    learned = [agent.critic.error, agent.critic.tilt]
    mean, error = mean_gradients(agent.of_values, policy, "loss_value", learned)
    assert (error > 0).sum() > 10
    assert worst(mean, error) < 6
    with torch.no_grad():
        agent.critic.error += 0.5
    again = mean_gradients(agent.of_values, policy, "loss_value", learned)
    assert worst(*again) > 20


def test_following_exact_values_is_the_gradient_of_the_soft_return(
    process: DenoisingProcess,
) -> None:
    """Where values are linear: against the gradient through the whole chain."""
    policy, agent, ctrl = moved(process), exact_agent(process), Ctrl()
    parameters: list[nn.Parameter] = [policy.shifts]
    one, error = mean_gradients(agent, policy, "loss_h_transform", parameters)
    other, other_error = mean_gradients(ctrl, policy, "loss_ctrl", parameters)
    difference, spread = one - other, (error**2 + other_error**2).sqrt()
    # Linear values and shifts leave nothing random in the gradient but the rounding of float32.
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-4) or worst(difference, spread) < 6
    assert one.abs().max() > 0.1


def test_a_policy_evaluated_anew_is_told_of_its_own_actions() -> None:
    """After a step, on a stored rollout: the gradient of v at the present mean, with old noise."""
    env = make("mixture2d", 8, K)
    agent = HTransform(task=task_of(env.process), critic=ConditionValues, minibatches=2)
    policy = noisy_drift(env, "mixture2d")
    with torch.no_grad():
        for parameter in agent.followed.parameters():
            parameter += 0.3 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(0)
            )
    batch = first_batch(env, policy, agent)
    moved = batch.copy()
    moved[keys.BEHAVIOUR_LOC] = batch[keys.LOC].detach() - 0.5  # as if the policy had moved on
    condition = joint_place(agent.sizes, dict(batch[keys.CONTROL].items()))
    loc = batch[keys.LOC].detach().requires_grad_()
    action = loc + (batch[keys.ACTION] - moved[keys.BEHAVIOUR_LOC])
    outputs = agent.followed(action, batch[keys.STEP] + 1)
    shares = outputs[..., 1:].log_softmax(-1).gather(-1, condition[..., None])[..., 0]
    variance = batch[keys.SCALE][..., None] ** 2
    kl = ((loc - batch[keys.PRIOR_LOC]) ** 2 / (2 * variance)).sum(-1)
    objective = (kl - outputs[..., 0] - shares).sum() / len(batch)
    (expected,) = torch.autograd.grad(objective, loc)
    (found,) = torch.autograd.grad(agent.loss(moved)["loss_h_transform"], batch[keys.LOC])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_last_part_is_ctrl() -> None:
    """To the bit, whatever the values are, and on a task where they are not linear."""
    found = []
    for make_agent in (
        lambda task: HTransform(task=task, critic=ConditionValues),
        lambda task: Ctrl(),
    ):
        env = make("mixture2d", 64, K)
        agent, policy = make_agent(task_of(env.process)), noisy_drift(env, "mixture2d")
        phase = in_force(agent.phases, 0.9)
        losses = phase.loss(first_batch(env, policy, phase))
        (name,) = {"loss_soft_return", "loss_ctrl"} & set(losses.keys())
        parameters = [p for group in policy.parameter_groups().values() for p in group]
        found.append(torch.autograd.grad(losses[name], parameters))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_without_the_last_part_no_gradient_of_the_reward_is_needed(
    process: DenoisingProcess,
) -> None:
    queried = HTransform(task=task_of(process), critic=ConditionValues, reward_share=0.0)
    assert not queried.needs_reward_gradient
    assert in_force(queried.phases, 0.99) is queried
    assert HTransform(task=task_of(process), critic=ConditionValues).needs_reward_gradient


def test_the_values_rest_once_the_policy_acts(process: DenoisingProcess) -> None:
    agent, policy = exact_agent(process), moved(process)
    env = make("gaussian", 64, K)
    assert in_force(agent.phases, 0.2) is agent.of_values
    assert in_force(agent.phases, 0.3) is agent
    assert in_force(agent.phases, 0.8) is agent.of_reward
    losses = agent.loss(first_batch(env, policy, agent))
    assert set(losses.keys()) == {"loss_h_transform", "soft_value"}
    losses["loss_h_transform"].backward()
    assert all(parameter.grad is None for parameter in agent.parameters())
    assert policy.shifts.grad is not None
    policy.shifts.grad = None
    calls = policy.calls
    losses = agent.of_values.loss(first_batch(env, policy, agent.of_values))
    assert set(losses.keys()) == {"loss_value"}
    losses["loss_value"].backward()
    assert policy.shifts.grad is None
    assert policy.calls == calls, "the policy is not evaluated for the values"
    assert all(parameter.grad is not None for parameter in agent.critic.parameters())
    assert all(parameter.grad is None for parameter in agent.followed.parameters())


def test_episodes_of_the_values_are_the_priors(process: DenoisingProcess) -> None:
    """Their mean reward is the closed form's, and every condition's is the env's own."""
    agent, policy = exact_agent(process), moved(process)
    env = make("gaussian", 4096, K)
    found = rollout(env, policy, plan=agent.of_values.plan)
    assert torch.equal(found[keys.LOC], found[keys.PRIOR_LOC])
    sheared = agent.of_values.prepare(found, RolledChain(env, policy))["condition_rewards"]
    # Row i has step k of episode i + k: turn back what was turned.
    rewards = torch.stack([sheared[:, k].roll(k, 0) for k in range(K)], 1)
    own = joint_place(agent.sizes, dict(found[keys.CONTROL].items()))[:, :1]
    torch.testing.assert_close(rewards[:, 0].gather(1, own), found[keys.NEXT_REWARD][:, -1])
    for number, condition in enumerate(process.conditions):
        control = {name: torch.full((4096,), label) for name, label in condition.items()}
        torch.testing.assert_close(
            rewards[:, -1, number], process.reward(found[keys.SAMPLE][:, 0], control)
        )
        shift = oracles(process)[number]
        mean = shift.value_constants[0] - float(
            (shift.sigmas**2 * (shift.value_weights[1:] ** 2).sum(1)).sum() / 2
        )
        spread = rewards[:, 0, number].std() / 64
        assert abs(rewards[:, 0, number].mean() - mean) < 5 * spread


@pytest.mark.parametrize("part", [0.0, 0.3])
def test_rows_hold_every_state_once_at_its_step(process: DenoisingProcess, part: float) -> None:
    """Each with its own label, rewards and action, and a row has states of K episodes."""
    agent, policy = exact_agent(process), moved(process)
    env, phase = make("gaussian", 6, K), in_force(agent.phases, part)
    episodes = rollout(env, policy, plan=phase.plan)
    sheared = phase.prepare(episodes, RolledChain(env, policy))
    assert torch.equal(sheared[keys.STEP], episodes[keys.STEP])
    for row in range(6):
        for step in range(K):
            origin = episodes[(row + step) % 6, step]
            for key, value in origin.exclude(keys.CLEAN, keys.SAMPLE).items(True, True):
                assert torch.equal(sheared[row, step][key], value), key
            if part == 0.0:
                control = {key: label[None] for key, label in origin[keys.CONTROL].items()}
                number = joint_place(label_counts(process.controls), control)
                own = sheared["condition_rewards"][row, step, number]
                reward = process.reward(origin[keys.SAMPLE][None], control)
                torch.testing.assert_close(own, reward)


def test_conditions_are_numbered_as_the_process_does() -> None:
    controls = {"shape": 3, "colour": 4}
    conditions = [{"shape": s, "colour": c} for s in range(3) for c in range(4)]
    for place, condition in enumerate(conditions):
        labels: Mapping[str, Tensor] = {k: torch.tensor([v]) for k, v in condition.items()}
        assert joint_place(controls, labels).tolist() == [place]
    asked = {name: Categorical.of(size) for name, size in controls.items()}
    task = TaskSpec(shape=(2,), num_steps=3, controls=asked)
    values = ConditionValues(task, width=8, depth=1)(torch.zeros(5, 3, 2), torch.ones(5, 3).long())
    assert values.shape == (5, 3, 1 + 12)
    assert (values == 0).all(), "no condition is likelier at the start"


def test_a_reward_of_probabilities_needs_no_sum() -> None:
    """Where the e^r of all labels sum to 1, the scale is 0 nats, and the sum has no gradient."""
    env = make("mixture2d", 64, K)
    process = env.process
    agent = HTransform(task=task_of(process), critic=ConditionValues)
    part = first_batch(env, StepShifts(process), agent.of_values)
    assert abs(float(agent.log_scale)) < 1e-5
    agent.of_values.loss(part)["loss_value"].backward()
    assert agent.critic.network.last.bias.grad[0].abs() < 1e-5
    assert agent.critic.network.last.bias.grad[1:].abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 17, 12), (2, 3, 3)])
def test_images_are_valued_by_convolutions(shape: tuple[int, ...]) -> None:
    task = TaskSpec(shape=shape, num_steps=3, controls={"label": Categorical.of(4)})
    network = ConditionValues(task, channels=8, width=16)
    values = network(torch.randn(5, 3, *shape), torch.ones(5, 3).long())
    assert values.shape == (5, 3, 1 + 4)
    assert (values == 0).all()
    assert isinstance(network.network, StepwiseEncoder)


def test_channels_out_of_range() -> None:
    task = TaskSpec(shape=(1, 8, 8), num_steps=3, controls={"label": Categorical.of(4)})
    with pytest.raises(ConfigError, match=r"agent\.critic\.channels=6 must be a multiple of 4"):
        ConditionValues(task, channels=6)


def test_rewards_of_conditions_run_in_one_call() -> None:
    env = make("mixture2d", 6, K)
    process, policy = env.process, StepShifts(env.process)
    agent = HTransform(task=task_of(process), critic=ConditionValues)
    found = prepared(env, policy, agent.of_values)["condition_rewards"]
    sizes, of_episodes = [], 6  # of the rollout itself
    process.reward_model.register_forward_hook(lambda *call: sizes.append(len(call[2])))
    prepared(env, policy, agent.of_values)
    assert sizes == [of_episodes, 6 * len(process.conditions)]
    assert found.shape == (6, K, len(process.conditions))


@pytest.mark.parametrize(
    "words",
    [
        *({"value_share": 0.0}, {"value_share": 1.0}, {"reward_share": 0.75}),
        *({"reward_share": -0.1}, {"average": 1.0}, {"average": -0.1}),
    ],
    ids=str,
)
def test_shares_out_of_range(process: DenoisingProcess, words: dict[str, float]) -> None:
    (name,) = words
    with pytest.raises(ConfigError, match=f"agent.{name}={words[name]}"):
        HTransform(task=task_of(process), critic=ConditionValues, **words)


def test_the_policy_follows_a_moving_average_that_forgets_its_start(
    process: DenoisingProcess,
) -> None:
    agent = HTransform(task=task_of(process), critic=ConditionValues, average=0.75)
    policy, env = StepShifts(process), make("gaussian", 8, K)
    bias, followed = agent.critic.network.last.bias, agent.followed.module.network.last.bias
    seen = []
    for value in (1.0, 2.0, 3.0, 8.0, 8.0):
        with torch.no_grad():
            bias.fill_(value)
        prepared(env, policy, agent.of_values)
        seen.append(float(followed[0]))
    assert seen == pytest.approx([1, 1.5, 2, 3.5, 4.625])  # even up to the fourth
    prepared(env, policy, agent)
    assert float(followed[0]) == pytest.approx(4.625), "the policy's own rollouts leave it"
