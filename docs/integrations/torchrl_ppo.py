"""PPO from TorchRL's parts on the vector control env, and the certified gap of what it learned.

python docs/integrations/torchrl_ppo.py [STEPS] [SEED]
"""

import sys
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import ctrl_rl

TASK = "mixture2d"
SEEN = ["x", "step", "control_group"]
EPISODES, EPOCHS, MINIBATCH = 256, 10, 512
RATE, MOST_NORM = 2e-3, 0.5


class Network(nn.Module):
    """A perceptron on the latent, the step and the label."""

    def __init__(self, dims: int, steps: int, labels: int, outputs: int) -> None:
        super().__init__()
        self.steps, self.labels = steps, labels
        hidden = [nn.Linear(dims + steps + labels, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
        self.layers = nn.Sequential(*hidden, nn.Linear(64, outputs))

    def forward(self, x: Tensor, step: Tensor, label: Tensor) -> Tensor:
        """[*B, outputs] of [*B, dims], [*B] and [*B]."""
        one_hot = nn.functional.one_hot
        return self.layers(
            torch.cat([x, one_hot(step, self.steps), one_hot(label, self.labels)], -1)
        )


class Actor(Network):
    """Mean and standard deviation of the action."""

    def __init__(self, dims: int, steps: int, labels: int) -> None:
        super().__init__(dims, steps, labels, dims)
        nn.init.orthogonal_(self.layers[-1].weight, 0.01)  # no drift at first
        nn.init.zeros_(self.layers[-1].bias)
        self.log_std = nn.Parameter(torch.full((dims,), -1.0))  # the env has noise of its own

    def forward(self, x: Tensor, step: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Both [*B, dims]."""
        loc = super().forward(x, step, label)
        return loc, self.log_std.exp().expand_as(loc)

    def act(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """The mean action, which is what is measured."""
        with torch.no_grad():
            return self(*(torch.as_tensor(observation[name]) for name in SEEN))[0].numpy()


def law(loc: Tensor, scale: Tensor) -> Independent:
    """A Gaussian of the whole action."""
    return Independent(Normal(loc, scale), 1)


def train(steps: int, seed: int = 0) -> Actor:
    """Train for about so many steps of the env."""
    torch.manual_seed(seed)
    env = GymWrapper(
        gymnasium.make_vec(
            "ctrl_rl.envs:ctrl_rl/Mixture2d-v0", num_envs=EPISODES, autoreset_mode="Disabled"
        ),
        categorical_action_encoding=True,  # labels and steps as numbers
    )
    env.set_seed(seed)
    spec = env.observation_spec
    sizes = spec["x"].shape[-1], spec["step"].space.n, spec["control_group"].space.n
    actor, critic = Actor(*sizes), ValueOperator(Network(*sizes, outputs=1), in_keys=SEEN)
    policy = ProbabilisticActor(
        TensorDictModule(actor, in_keys=SEEN, out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=law,
        return_log_prob=True,
    )
    advantage = GAE(gamma=1.0, lmbda=0.95, value_network=critic)  # the plain return is J
    loss = ClipPPOLoss(
        policy,
        critic,
        clip_epsilon=0.2,
        entropy_bonus=False,  # the KL in the reward has its place
        loss_critic_type="l2",
        critic_coeff=0.5,
        normalize_advantage=True,
    )
    optimizer = torch.optim.Adam(loss.parameters(), lr=RATE, eps=1e-5)
    frames = EPISODES * (spec["step"].space.n - 1)  # one episode of every env
    updates = max(1, steps // frames)
    collector = Collector(
        env,
        policy,
        frames_per_batch=frames,
        total_frames=updates * frames,
        auto_register_policy_transforms=False,
    )
    for done, batch in enumerate(collector):
        optimizer.param_groups[0]["lr"] = RATE * (1 - done / updates)
        with torch.no_grad():
            advantage(batch)
        rows = batch.reshape(-1)
        for _ in range(EPOCHS):
            for places in torch.randperm(len(rows)).split(MINIBATCH):
                terms = loss(rows[places])
                optimizer.zero_grad()
                (terms["loss_objective"] + terms["loss_critic"]).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), MOST_NORM)
                optimizer.step()
    collector.shutdown()
    return actor


def main(steps: int = 400_000, seed: int = 0) -> dict[str, Any]:
    """Train, and measure the mean action."""
    return ctrl_rl.evaluate_policy(TASK, train(steps, seed).act).summary


if __name__ == "__main__":
    summary = main(*map(int, sys.argv[1:]))
    print({name: summary[name] for name in ("gap_nats", "gap_nats_ci", "gap_nats_certified")})
