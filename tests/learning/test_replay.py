"""What the batches of an agent's losses hold: epochs, minibatches, pieces along time, the past."""

import pytest
import torch
from tensordict import TensorDict

from ctrl_rl import keys
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.errors import InvariantError
from ctrl_rl.learning.replay import Replay, check_refresh, refresh
from ctrl_rl.policies import DenoisingPolicy, PriorPolicy
from ctrl_rl.runs.build import build_policy, build_process
from ctrl_rl.runs.compose import compose

K = 5
SERIAL = "serial"  # of an episode, over all rollouts
LEARNED = (keys.LOC, keys.ACTION_LOG_PROB, keys.KL, keys.LOG_RATIO)


@pytest.fixture(scope="module")
def process():
    return build_process(compose("train", ["env=mixture2d", f"kernel.num_steps={K}"]))


@pytest.fixture
def policy(process) -> DenoisingPolicy:
    """A policy that is not the prior."""
    policy = build_policy(compose("train", ["env=mixture2d", f"kernel.num_steps={K}"]), process)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


def episodes_of(process, policy, n: int, *, seed: int = 0, first: int = 0) -> TensorDict:
    with torch.no_grad():
        episodes = rollout(LatentEnv(process, num_envs=n, seed=seed), policy)
    serial = torch.arange(first, first + n)[:, None].expand(n, K)
    return episodes.set(SERIAL, serial)


def replay_of(**plan: int) -> Replay:
    return Replay(RolloutPlan(gradients="score", **plan), torch.Generator().manual_seed(0))


# --- refresh ----------------------------------------------------------------------------------


def test_refresh_gives_the_rollouts_own_values(process, policy):
    episodes = episodes_of(process, policy, 16)
    calls = policy.calls
    fresh = refresh(policy, episodes)
    assert policy.calls == calls + 16 * K
    assert set(fresh.keys(True)) == set(episodes.keys(True))
    for key, value in episodes.items(True, True):
        if key in LEARNED:
            assert fresh[key].requires_grad, key
            torch.testing.assert_close(fresh[key].detach(), value, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(fresh[key], value), key
    check_refresh(policy, episodes)


def test_refresh_is_of_the_present_policy(process, policy):
    episodes = episodes_of(process, policy, 16)
    changed = refresh(PriorPolicy(process.kernel), episodes)
    assert torch.equal(changed[keys.LOC], episodes[keys.PRIOR_LOC])
    assert (changed[keys.KL] == 0).all() and (changed[keys.LOG_RATIO] == 0).all()
    torch.testing.assert_close(changed[keys.ACTION_LOG_PROB], episodes[keys.PRIOR_LOG_PROB])
    assert torch.equal(changed[keys.BEHAVIOUR_LOC], episodes[keys.LOC])
    with pytest.raises(InvariantError, match="moves log pi by"):
        check_refresh(PriorPolicy(process.kernel), episodes)


# --- epochs, minibatches, pieces --------------------------------------------------------------


def test_a_plan_of_one_step_hands_on_the_rollout_itself(process, policy):
    plan = RolloutPlan(gradients="score")
    episodes = rollout(LatentEnv(process, num_envs=4), policy, plan=plan)
    ((piece,),) = Replay(plan, torch.Generator()).batches(episodes, policy)
    assert piece is episodes and piece[keys.LOC].requires_grad


@pytest.mark.parametrize(
    ("size", "epochs", "minibatches"), [(12, 1, 4), (12, 3, 1), (12, 2, 3), (10, 2, 4)]
)
def test_every_episode_is_served_once_per_epoch(process, policy, size, epochs, minibatches):
    episodes = episodes_of(process, policy, size)
    replay = replay_of(epochs=epochs, minibatches=minibatches)
    served = []
    for pieces in replay.batches(episodes, policy):
        (piece,) = pieces
        serial = piece[SERIAL][:, 0]
        # What comes with a number is that episode, whole.
        assert torch.equal(piece[keys.X], episodes[keys.X][serial])
        assert torch.equal(piece[keys.CONTROL, "group"], episodes[keys.CONTROL, "group"][serial])
        served.append(serial)
    assert len(served) == epochs * minibatches
    orders = [
        torch.cat(served[start : start + minibatches])
        for start in range(0, len(served), minibatches)
    ]
    for order in orders:
        assert order.sort().values.tolist() == list(range(size))
    if epochs > 1:
        assert not torch.equal(orders[0], orders[1])


@pytest.mark.parametrize("step_chunks", [2, 3, K])
def test_pieces_along_time_make_up_the_whole(process, policy, step_chunks):
    episodes = episodes_of(process, policy, 6)
    (pieces,) = replay_of(step_chunks=step_chunks).batches(episodes, policy)
    pieces = list(pieces)
    assert len(pieces) == step_chunks
    whole = torch.cat(pieces, 1).detach()
    assert torch.equal(whole[keys.STEP], torch.arange(K).expand(6, K))
    order = whole[SERIAL][:, 0]
    of_the_end = (keys.CLEAN, keys.SAMPLE)
    assert not set(of_the_end) & set(whole.keys())
    for key, value in episodes[order].exclude(*of_the_end).items(True, True):
        if key in LEARNED:
            torch.testing.assert_close(whole[key], value, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(whole[key], value), key


def test_each_batch_is_of_the_policy_as_it_is_then(process, policy):
    episodes = episodes_of(process, policy, 6)
    for pieces in replay_of(epochs=3).batches(episodes, policy):
        with torch.no_grad():
            policy.drift.last.bias += 0.1
        (piece,) = pieces
        again = refresh(policy, piece)
        assert torch.equal(again[keys.LOC], piece[keys.LOC])
        assert (piece[keys.LOC] - piece[keys.BEHAVIOUR_LOC]).abs().max() > 1e-3


# --- past episodes ----------------------------------------------------------------------------


def feed(replay: Replay, process, policy, *, updates: range, size: int) -> list[TensorDict]:
    """The batches of some updates, each with a rollout of its own."""
    served = []
    for update in updates:
        episodes = episodes_of(process, policy, size, seed=update, first=update * size)
        for pieces in replay.batches(episodes, policy):
            served += [piece.detach() for piece in pieces]
    return served


@pytest.mark.parametrize(("kept", "size", "updates"), [(12, 4, 2), (12, 4, 5), (10, 4, 6)])
def test_draws_come_from_the_last_episodes(process, kept, size, updates):
    policy = PriorPolicy(process.kernel)
    replay = replay_of(replay=kept, epochs=40)
    last = feed(replay, process, policy, updates=range(updates), size=size)[-40:]
    drawn = {int(serial) for batch in last for serial in batch[SERIAL][:, 0]}
    newest = updates * size
    assert drawn == set(range(max(0, newest - kept), newest))
    assert all(len(batch) == size for batch in last)


def test_a_rollout_larger_than_the_past_leaves_its_last_episodes(process):
    replay = replay_of(replay=3, epochs=10)
    served = feed(replay, process, PriorPolicy(process.kernel), updates=range(2), size=8)
    drawn = {int(serial) for batch in served[10:] for serial in batch[SERIAL][:, 0]}
    assert drawn == {13, 14, 15}


# Interrupted before the ring is full, when it is just full, after it went round, and for sizes
# where a rollout wraps around the ring's end or is larger than the ring.
@pytest.mark.parametrize(
    ("kept", "size", "updates"),
    [(12, 4, 1), (12, 4, 2), (12, 4, 3), (12, 4, 4), (12, 4, 7), (10, 4, 3), (10, 4, 6), (3, 4, 2)],
)
def test_an_interruption_changes_no_draw(process, kept, size, updates):
    policy = PriorPolicy(process.kernel)
    through = replay_of(replay=kept, minibatches=2)
    feed(through, process, policy, updates=range(updates), size=size)

    resumed = replay_of(replay=kept, minibatches=2)
    resumed.load({name: value.clone() for name, value in through.state().items()})
    resumed.generator.set_state(through.generator.get_state())

    later = range(updates, updates + 5)
    expected = feed(through, process, policy, updates=later, size=size)
    found = feed(resumed, process, policy, updates=later, size=size)
    assert len(found) == len(expected) == 10
    for one, other in zip(found, expected, strict=True):
        assert set(one.keys(True)) == set(other.keys(True))
        for key, value in other.items(True, True):
            assert torch.equal(one[key], value), key


def test_without_a_past_there_is_no_state(process, policy):
    replay = replay_of(epochs=2)
    list(replay.batches(episodes_of(process, policy, 4), policy))
    assert replay.state() == {}
    assert replay_of(replay=4).state() == {}
    replay_of(replay=4).load({})
