"""Arithmetic on rollouts against plain loops."""

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.objectives.value.functional import generalized_advantage_estimate

from ctrl_rl import keys
from ctrl_rl.agents.parts.advantages import (
    centred,
    condition_index,
    generalized_advantage,
    group_mean,
    group_std,
    leave_one_out_mean,
    returns_to_go,
    step_advantage,
)

B, K = 9, 4


def rollout_of(seed: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    reward = torch.zeros(B, K, 1)
    reward[:, -1, 0] = torch.randn(B, generator=generator)
    names = {"digit": 3, "hue": 2}
    control = {n: torch.randint(m, (B, 1), generator=generator) for n, m in names.items()}
    return TensorDict(
        {
            keys.STEP: torch.arange(K).expand(B, K),
            keys.KL: torch.rand(B, K, generator=generator, requires_grad=True),
            keys.CONTROL: {name: label.expand(B, K) for name, label in control.items()},
            "next": {"reward": reward},
        },
        batch_size=[B, K],
    )


def groups() -> tuple[Tensor, list[int]]:
    index = [0, 2, 2, 1, 0, 2, 3, 2, 0]  # 1 and 3 are alone
    return torch.tensor(index), index


def values_of(*shape: int) -> Tensor:
    return torch.randn(B, *shape, generator=torch.Generator().manual_seed(1))


def test_returns_to_go():
    rollout = rollout_of()
    found = returns_to_go(rollout)
    assert not found.requires_grad
    for b in range(B):
        for k in range(K):
            expected = float(rollout[keys.NEXT_REWARD][b, K - 1, 0])
            for j in range(k, K):
                expected -= rollout[keys.KL][b, j].item()
            assert found[b, k].item() == pytest.approx(expected, abs=1e-5)


def test_returns_to_go_of_another_penalty():
    rollout = rollout_of().set(keys.LOG_RATIO, torch.full((B, K), 2.0))
    expected = rollout[keys.NEXT_REWARD][:, -1] - 2 * torch.arange(K, 0, -1)
    torch.testing.assert_close(returns_to_go(rollout, keys.LOG_RATIO), expected)


def test_condition_index_is_equal_where_all_controls_are():
    rollout = rollout_of()
    index = condition_index(rollout)
    labels = [
        tuple(int(rollout[keys.CONTROL, n][b, 0]) for n in ("digit", "hue")) for b in range(B)
    ]
    assert len(set(labels)) < B
    for a in range(B):
        for b in range(B):
            assert (index[a] == index[b]) == (labels[a] == labels[b])
    assert (condition_index(rollout.exclude(keys.CONTROL).set(keys.CONTROL, {})) == 0).all()


@pytest.mark.parametrize("shape", [(), (K,)])
def test_statistics_per_group(shape):
    values, (index, of) = values_of(*shape), groups()
    mean, std = group_mean(values, index), group_std(values, index)
    others = leave_one_out_mean(values, index)
    for b in range(B):
        mine = [values[a] for a in range(B) if of[a] == of[b]]
        average = sum(mine) / len(mine)
        variance = sum((value - average) ** 2 for value in mine) / len(mine)
        torch.testing.assert_close(mean[b], average)
        torch.testing.assert_close(std[b], variance**0.5)
        rest = [values[a] for a in range(B) if of[a] == of[b] and a != b]
        if not rest:  # alone in its group: all others
            rest = [values[a] for a in range(B) if a != b]
        torch.testing.assert_close(others[b], sum(rest) / len(rest))


def test_a_baseline_does_not_depend_on_its_own_sample():
    values, (index, _) = values_of(), groups()
    for b in range(B):
        changed = values.clone()
        changed[b] += 100
        found, before = leave_one_out_mean(changed, index)[b], leave_one_out_mean(values, index)[b]
        torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-4)


def test_a_single_episode_has_the_baseline_zero():
    zero = leave_one_out_mean(torch.tensor([3.0]), torch.tensor([0]))
    assert zero.tolist() == [0.0]


def test_step_advantage():
    rollout = rollout_of()
    index, found = condition_index(rollout).tolist(), step_advantage(rollout)
    reward, kl = rollout[keys.NEXT_REWARD][:, -1, 0], rollout[keys.KL].detach()
    for k in range(K):
        after = reward - kl[:, k + 1 :].sum(1)  # the action at k changes nothing earlier
        for b in range(B):
            rest = [after[a] for a in range(B) if index[a] == index[b] and a != b]
            rest = rest or [after[a] for a in range(B) if a != b]
            torch.testing.assert_close(found[b, k], after[b] - sum(rest) / len(rest))


def test_centred_forgets_what_the_episodes_of_a_control_share_at_a_step():
    rollout, values = rollout_of(), values_of(K)
    index, found = condition_index(rollout).tolist(), centred(values, rollout)
    for b in range(B):
        others = [values[a] for a in range(B) if index[a] == index[b] and a != b]
        others = others or [values[a] for a in range(B) if a != b]
        torch.testing.assert_close(found[b], values[b] - sum(others) / len(others))
    missed = 50 * torch.randn(K, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(centred(values + missed, rollout), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_generalized_advantage_is_torchrls(gae_lambda):
    rollout, values = rollout_of(), values_of(K)
    gains = (rollout[keys.NEXT_REWARD][..., 0] - rollout[keys.KL]).detach()
    found = generalized_advantage(gains, values, gae_lambda)
    done = torch.zeros(B, K, 1, dtype=torch.bool)
    done[:, -1] = True
    following = torch.cat([values[:, 1:], torch.full((B, 1), 7.0)], 1)  # the last one is unused
    advantage, _ = generalized_advantage_estimate(
        1.0, gae_lambda, values[..., None], following[..., None], gains[..., None], done, done
    )
    torch.testing.assert_close(found, advantage[..., 0])
    if gae_lambda == 1:
        torch.testing.assert_close(found, returns_to_go(rollout) - values)
