"""Policies: the prior at the start, gradients, noise of the right width."""

from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.controls import Categorical
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import check_invariants, rollout
from ctrl_rl.errors import ConfigError
from ctrl_rl.kernels import ddpm_kernel
from ctrl_rl.networks.perceptrons import (
    ConditionedPerceptron,
    ControlEmbedding,
    ModulatedPerceptron,
)
from ctrl_rl.policies import (
    DenoisingPolicy,
    DriftPolicy,
    FineTunedPolicy,
    PriorPolicy,
    SideNetworkPolicy,
    StrengthPolicy,
)
from ctrl_rl.priors import diffusers_unet_prior
from ctrl_rl.rewards import FunctionReward
from ctrl_rl.runs.loaded import make_process

CONTROLS = {"shade": Categorical.of(2), "side": Categorical.of(3)}


def shade(sample: Tensor, control: dict[str, Tensor]) -> Tensor:
    return sample.mean((1, 2, 3)) * (1 - 2 * control["shade"]) + sample[..., 0].mean((1, 2))


@pytest.fixture
def process(tiny_pipeline: Path) -> DenoisingProcess:
    prior = diffusers_unet_prior(path=str(tiny_pipeline))
    return DenoisingProcess(
        prior=prior,
        kernel=ddpm_kernel(scheduler_config=prior.scheduler_config, num_steps=3),
        reward=FunctionReward(function=shade, controls=CONTROLS, differentiable=True),
    )


@pytest.fixture
def fine_tuned(process: DenoisingProcess) -> FineTunedPolicy:
    return FineTunedPolicy(prior=process.prior, kernel=process.kernel, controls=process.controls)


Beside = TypeVar("Beside", DriftPolicy, SideNetworkPolicy)


def drift(process: DenoisingProcess, random: bool) -> DriftPolicy:
    return beside(DriftPolicy, process, random)


def beside(kind: type[Beside], process: DenoisingProcess, random: bool) -> Beside:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = kind(
            prior=process.prior, kernel=process.kernel, controls=process.controls, width=16
        )
        if random:
            for parameter in policy.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
    return policy


def soft_return(env: LatentEnv, policy: DenoisingPolicy, plan: RolloutPlan) -> Tensor:
    episode = rollout(env, policy, plan=plan)
    total: Tensor = episode[keys.NEXT_REWARD].sum((1, 2)) - episode[keys.KL].sum(1)
    return total.mean()


@pytest.mark.parametrize("truncation", [None, 1, "uniform"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fine_tuned_policy_starts_as_the_prior_bit_for_bit(
    process: DenoisingProcess,
    fine_tuned: FineTunedPolicy,
    truncation: int | str | None,
    checkpointing: bool,
) -> None:
    fine_tuned.train()
    for num_envs in (1, 7):
        plan = RolloutPlan(gradients="pathwise", truncation=truncation, checkpointing=checkpointing)
        episode = rollout(LatentEnv(process, num_envs=num_envs), fine_tuned, plan=plan)
        assert torch.equal(episode[keys.LOC], episode[keys.PRIOR_LOC])
        check_invariants(episode, plan)


def test_gradient_reaches_network_and_embedding(
    process: DenoisingProcess, fine_tuned: FineTunedPolicy
) -> None:
    env = LatentEnv(process, num_envs=6)
    soft_return(env, fine_tuned, RolloutPlan(gradients="pathwise")).backward()
    groups = fine_tuned.parameter_groups()
    assert set(groups) == {"network", "embedding"}
    grouped = [parameter for group in groups.values() for parameter in group]
    assert {id(p) for p in grouped} == {id(p) for p in fine_tuned.parameters() if p.requires_grad}
    # The last layer always has one; deeper ones may be cut by a ReLU, so the count is enough.
    reached = [p for p in groups["network"] if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(reached) > 0.9 * len(groups["network"])
    for table in groups["embedding"]:
        assert table.grad is not None
        assert (table.grad[:-1].abs().sum(1) > 0).all()  # every label of a balanced batch
        assert (table.grad[-1] == 0).all()  # but not the null label
    assert all(p.grad is None for p in process.parameters())


def test_null_label_stays_the_prior_through_training(
    process: DenoisingProcess, fine_tuned: FineTunedPolicy
) -> None:
    env = LatentEnv(process, num_envs=6)
    optimizer = torch.optim.AdamW(fine_tuned.embedding.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        soft_return(env, fine_tuned, RolloutPlan(gradients="pathwise")).neg().backward()
        optimizer.step()
    for table in fine_tuned.embedding.parameters():
        assert (table[-1] == 0).all() and (table[:-1] != 0).any()
    null = {name: control.null for name, control in CONTROLS.items()}
    with torch.no_grad():
        assert (rollout(env, fine_tuned, control=null)[keys.KL] == 0).all()
        assert (rollout(env, fine_tuned, control={"shade": 0})[keys.KL] > 0).all()


def test_checkpointing_gives_the_same_gradients(process: DenoisingProcess) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = FineTunedPolicy(
            prior=process.prior, kernel=process.kernel, controls=process.controls
        )
        plan = RolloutPlan(gradients="pathwise", checkpointing=checkpointing)
        soft_return(LatentEnv(process, num_envs=4, seed=3), policy, plan).backward()
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)


def test_fine_tuned_policy_leaves_the_prior_alone(
    process: DenoisingProcess, fine_tuned: FineTunedPolicy
) -> None:
    theirs = {p.data_ptr() for p in process.prior.parameters()}
    assert not theirs & {p.data_ptr() for p in fine_tuned.parameters()}


def test_policies_refuse_priors_that_do_not_fit(process: DenoisingProcess) -> None:
    with pytest.raises(ConfigError, match="use policy=side_network"):
        drift(process, random=False)
    gaussian = make_process("gaussian")
    with pytest.raises(ConfigError, match="use policy=side_network"):
        FineTunedPolicy(prior=gaussian.prior, kernel=gaussian.kernel, controls=gaussian.controls)


def test_drift_is_in_standard_deviations() -> None:
    process = make_process("mixture2d", ["kernel.num_steps=4"])
    env = LatentEnv(process, num_envs=16)
    policy = drift(process, random=False)
    assert torch.equal(rollout(env, policy)[keys.KL], torch.zeros(16, 4))
    policy = drift(process, random=True)
    episode = rollout(env, policy)
    state = episode[:, 2]
    control = dict(state[keys.CONTROL].items())
    with torch.no_grad():
        u = policy.drift(state[keys.X], state[keys.STEP], control)
    torch.testing.assert_close(state[keys.KL], u.square().sum(1) / 2, rtol=1e-3, atol=1e-4)
    assert (state[keys.KL] > 0).all()
    before = process.prior_calls
    policy(env.reset())
    assert process.prior_calls - before == 16  # the env's; a drift policy needs none of its own


def test_side_network_is_in_standard_deviations_and_calls_no_prior(
    process: DenoisingProcess,
) -> None:
    env = LatentEnv(process, num_envs=12)
    policy = beside(SideNetworkPolicy, process, random=False)
    assert torch.equal(rollout(env, policy)[keys.KL], torch.zeros(12, 3))
    policy = beside(SideNetworkPolicy, process, random=True)
    state = rollout(env, policy)[:, 1]
    scale = process.kernel.scale[1]
    seen = torch.cat([state[keys.X], (state[keys.PRIOR_LOC] - state[keys.X]) / scale], 1)
    with torch.no_grad():
        u = policy.drift(seen.flatten(1), state[keys.STEP], dict(state[keys.CONTROL].items()))
    torch.testing.assert_close(state[keys.KL], u.square().sum(1) / 2, rtol=1e-3, atol=1e-4)
    assert (state[keys.KL] > 0).all()
    before = process.prior_calls
    policy(env.reset())
    assert process.prior_calls - before == 12  # the env's


def test_side_network_learns_through_the_drift_of_the_prior(process: DenoisingProcess) -> None:
    # The chain's gradient has a part that flows through prior_loc into the network's input.
    env = LatentEnv(process, num_envs=4)
    policy = beside(SideNetworkPolicy, process, random=True)
    state = env.reset()
    prior_loc = state[keys.PRIOR_LOC].clone().requires_grad_()
    control = dict(state[keys.CONTROL].items())
    shift = policy.loc(state[keys.X], state[keys.STEP], control, prior_loc) - prior_loc
    (gradient,) = torch.autograd.grad(shift.square().sum(), prior_loc)
    assert (gradient != 0).any()


def test_strength_mixes_prior_and_policy() -> None:
    process = make_process("mixture2d", ["kernel.num_steps=4"])
    policy = drift(process, random=True)
    state = LatentEnv(process, num_envs=16).reset()
    arguments = (state["x"], state["step"], dict(state["control"].items()), state["prior_loc"])
    with torch.no_grad():
        trained = policy.loc(*arguments)
        for strength in (0.0, 0.5, 1.0, 2.0):
            loc = StrengthPolicy(policy, strength).loc(*arguments)
            exact = (1 - strength) * state["prior_loc"] + strength * trained
            torch.testing.assert_close(loc, exact)
    assert torch.equal(StrengthPolicy(policy, 0.0).loc(*arguments), state["prior_loc"])


@pytest.mark.parametrize("kind", ["prior", "drift", "strength"])
def test_stock_rollout_draws_with_the_stated_width(kind: str) -> None:
    # TorchRL's exploration type is deterministic outside a collector; noise is no exploration here.
    process = make_process("mixture2d", ["kernel.num_steps=5"])
    policy: DenoisingPolicy = {
        "prior": PriorPolicy(process.kernel),
        "drift": drift(process, random=True),
        "strength": StrengthPolicy(drift(process, random=True), 0.5),
    }[kind]
    torch.manual_seed(0)
    with torch.no_grad():
        episode = LatentEnv(process, num_envs=4096).rollout(5, policy)
    noise = (episode["action"] - episode["loc"]) / episode["scale"][..., None]
    dims = noise[:, 0].numel()
    assert (noise.mean((0, 2)).abs() < 4 / dims**0.5).all()
    assert ((noise.std((0, 2)) - 1).abs() < 4 / (2 * dims) ** 0.5).all()
    assert torch.equal(episode["scale"], process.kernel.scale[:5].expand(4096, 5))


def test_embedding_is_a_sum_of_tables() -> None:
    embedding = ControlEmbedding(CONTROLS, 4)
    for table in embedding.parameters():
        torch.nn.init.normal_(table.data[:-1])
    shade, side = torch.tensor([0, 1, 2]), torch.tensor([3, 2, 0])  # 2 and 3 are the null labels
    both = embedding({"shade": shade, "side": side})
    first, second = embedding.tables["shade"].weight, embedding.tables["side"].weight
    torch.testing.assert_close(both, first[shade] + second[side])
    assert torch.equal(both[0], first[0]) and torch.equal(both[2], second[0])
    assert sum(p.shape[0] for p in embedding.parameters()) == 2 + 3 + 2  # not 2 x 3


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_modulated_perceptron_starts_at_zero_and_every_part_of_it_learns(depth: int) -> None:
    torch.manual_seed(0)
    network = ModulatedPerceptron(
        inputs=3,
        outputs=2,
        num_steps=5,
        controls={"y": Categorical.of(2), "z": Categorical.of(3)},
        width=8,
        depth=depth,
    )
    x, step = torch.randn(40, 3), torch.arange(40) % 5
    control = {"y": torch.arange(40) % 2, "z": torch.arange(40) % 3}
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    assert torch.equal(network(x, step, control), torch.zeros(40, 2))
    # What to give depends on x, and how on step and labels: multiplied, not added.
    factor = (1 + step) * (1 - 2.0 * control["y"]) + control["z"]
    target = (x[:, :2].tanh() * factor[:, None]).detach()
    for _ in range(300):
        optimizer.zero_grad()
        loss = (network(x, step, control) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.02 * target.square().mean()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), name
    tables = [p for name, p in network.named_parameters() if ".labels.tables." in name]
    assert tables and all((table[-1] == 0).all() for table in tables)  # the null label's row


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_drift_network_starts_at_zero_with_a_gradient(depth: int) -> None:
    network = ConditionedPerceptron(
        inputs=3, outputs=3, num_steps=5, controls={"y": Categorical.of(2)}, width=8, depth=depth
    )
    x, step, control = torch.randn(6, 3), torch.arange(6) % 5, {"y": torch.arange(6) % 2}
    output = network(x, step, control)
    assert torch.equal(output, torch.zeros(6, 3))
    (output - 1).square().sum().backward()
    assert network.last.weight.grad is not None and (network.last.weight.grad != 0).any()
