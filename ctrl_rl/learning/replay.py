"""From rollouts to the batches that an agent's losses see: epochs, minibatches, chunks, replay.

If a plan asks for more than one optimizer step per rollout, or for past episodes, the policy is
re-evaluated on the stored latents: one network call for all [b, T] states of a piece. `loc`,
`action_log_prob`, `kl` and `log_ratio` are then the current policy's, with a graph;
`behaviour_loc` remains that of the policy that acted.
"""

from collections.abc import Iterator

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import LazyTensorStorage, ReplayBuffer

from ctrl_rl import gaussian, keys
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.errors import InvariantError
from ctrl_rl.policies import DenoisingPolicy

# nats per dimension between log pi at rollout and re-evaluated in a batch of another shape: float32
# networks agree to about 1e-6, and a policy in another mode or precision does not to 1e-4
_REPLAY_TOLERANCE = 1e-4
_OF_THE_END = (keys.CLEAN, keys.SAMPLE)


def refresh(policy: DenoisingPolicy, episodes: TensorDict) -> TensorDict:
    """Re-evaluate the policy on stored latents.

    Args:
        policy: the current policy; its calls are counted.
        episodes: [b, T] of a rollout, any T.

    Returns:
        [b, T], the same with `loc`, `action_log_prob`, `kl`, `log_ratio` of the current policy.
    """
    flat = episodes.select(keys.X, keys.STEP, keys.CONTROL, keys.PRIOR_LOC).flatten(0, 1)
    control = dict(flat[keys.CONTROL].items())
    loc = policy.loc(flat[keys.X], flat[keys.STEP], control, flat[keys.PRIOR_LOC])
    loc = loc.unflatten(0, episodes.batch_size)
    action, prior_loc, scale = (episodes[k] for k in (keys.ACTION, keys.PRIOR_LOC, keys.SCALE))
    fresh = episodes.copy()
    fresh.set(keys.LOC, loc)
    fresh.set(keys.ACTION_LOG_PROB, gaussian.log_prob(action, loc, scale))
    fresh.set(keys.KL, gaussian.kl(loc, prior_loc, scale))
    fresh.set(keys.LOG_RATIO, gaussian.log_ratio(action, loc, prior_loc, scale))
    return fresh


def check_refresh(policy: DenoisingPolicy, episodes: TensorDict) -> None:
    """Assert that a re-evaluation equals the rollout.

    Args:
        policy: the policy of the rollout, unchanged since.
        episodes: [B, T].

    Raises:
        InvariantError: log pi moved by more than rounding.
    """
    with torch.no_grad():
        again = refresh(policy, episodes)[keys.ACTION_LOG_PROB]
    dims = episodes[keys.X][0, 0].numel()
    moved = float((again - episodes[keys.ACTION_LOG_PROB]).abs().max()) / dims
    if not moved < _REPLAY_TOLERANCE:
        raise InvariantError(
            f"the policy evaluated anew on stored latents moves log pi by {moved:.3g} nats per "
            "dimension; it must not depend on its batch, its mode or hidden state"
        )


class Replay:
    """Serves the batches of one agent's plan.

    Args:
        plan: the agent's.
        generator: draws the order of minibatches and the past episodes.
    """

    def __init__(self, plan: RolloutPlan, generator: torch.Generator) -> None:
        self.plan, self.generator = plan, generator
        self.written = 0  # episodes, ever
        self.buffer = ReplayBuffer(storage=LazyTensorStorage(plan.replay)) if plan.replay else None

    def batches(
        self, episodes: TensorDict, policy: DenoisingPolicy
    ) -> Iterator[Iterator[TensorDict]]:
        """Batches of one update.

        Args:
            episodes: [B, K], a rollout under the plan, prepared by the agent.
            policy: the current policy.

        Yields:
            Once per optimizer step: the pieces [b, T] whose losses are differentiated one by one,
            each made on demand.
        """
        if not self.plan.makes_batches:
            yield iter([episodes])
            return
        # Only whole rollouts have them: cuts would copy these views for every step.
        episodes = episodes.exclude(*_OF_THE_END).detach()
        if self.buffer is not None:
            self._write(episodes.cpu())
        size = len(episodes)
        for _ in range(self.plan.epochs):
            order = torch.randperm(size, generator=self.generator, device=self.generator.device)
            for index in order.tensor_split(min(self.plan.minibatches, size)):
                batch = episodes[index] if self.buffer is None else self._draw(len(index))
                pieces = batch.to(episodes.device).chunk(self.plan.step_chunks, dim=1)
                yield (
                    refresh(policy, part) if self.plan.reevaluates_policy else part
                    for part in pieces
                )

    def state(self) -> dict[str, Tensor]:
        """The past episodes by dotted names, empty without replay."""
        if self.buffer is None or self.written == 0:
            return {}
        stored = self.buffer[:].flatten_keys(".").items()
        return {"written": torch.tensor(self.written), **{f"episodes.{k}": v for k, v in stored}}

    def load(self, state: dict[str, Tensor]) -> None:
        """Load what `state` gave: every episode at its position."""
        if self.buffer is None or not state:
            return
        stored = {k.removeprefix("episodes."): v for k, v in state.items() if k != "written"}
        shape = stored[keys.STEP].shape  # [size, T]
        size = shape[0]
        episodes = TensorDict(stored, batch_size=shape).unflatten_keys(".")
        episodes = episodes.exclude(*_OF_THE_END)  # older runs kept these
        written = int(state["written"])
        # The buffer is a ring: the oldest episode of a full one lies where the next is written.
        oldest = written % self.plan.replay if written > self.plan.replay else 0
        in_time = episodes[torch.arange(oldest, oldest + size) % size]
        if oldest:
            self.buffer.extend(in_time[:oldest])  # advances the ring; overwritten at once
        self.buffer.extend(in_time)
        self.written = written

    def _write(self, episodes: TensorDict) -> None:
        assert self.buffer is not None
        kept = episodes[-self.plan.replay :]
        self.buffer.extend(kept)
        self.written += len(kept)

    def _draw(self, n: int) -> TensorDict:
        assert self.buffer is not None
        size, device = len(self.buffer), self.generator.device
        drawn = self.buffer[
            torch.randint(size, (n,), generator=self.generator, device=device).cpu()
        ]
        return drawn
