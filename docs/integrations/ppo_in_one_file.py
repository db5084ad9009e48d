"""PPO in one file, in plain torch, on the vector control env; then its certified gap.

python docs/integrations/ppo_in_one_file.py [STEPS] [SEED]
"""

import sys
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import ctrl_rl

TASK = "mixture2d"
EPISODES, EPOCHS, MINIBATCH = 256, 10, 512
RATE, CLIP, GAE_LAMBDA, MOST_NORM = 2e-3, 0.2, 0.95, 0.5


class ActorCritic(nn.Module):
    """A Gaussian policy and a value of the observation, two networks.

    Args:
        dims: of the latent, and so of the action.
        steps: K.
        labels: number of labels of the control, the null label included.
    """

    def __init__(self, dims: int, steps: int, labels: int) -> None:
        super().__init__()
        self.steps, self.labels = steps, labels
        self.actor = self._network(dims + steps + 1 + labels, dims, gain=0.01)  # no drift at first
        self.critic = self._network(dims + steps + 1 + labels, 1, gain=1.0)
        self.log_std = nn.Parameter(torch.full((dims,), -1.0))  # the env has noise of its own

    def features(self, observation: dict[str, np.ndarray]) -> Tensor:
        """[B, dims + steps + 1 + labels]: the latent, the step and the label."""
        step = nn.functional.one_hot(torch.as_tensor(observation["step"]), self.steps + 1)
        label = nn.functional.one_hot(torch.as_tensor(observation["control_group"]), self.labels)
        return torch.cat([torch.as_tensor(observation["x"]), step, label], 1)

    def policy(self, features: Tensor) -> Normal:
        """The law of actions."""
        return Normal(self.actor(features), self.log_std.exp())

    def act(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """The mean action, which is what is measured."""
        with torch.no_grad():
            return self.actor(self.features(observation)).numpy()

    @staticmethod
    def _network(inputs: int, outputs: int, gain: float) -> nn.Sequential:
        layers = [nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
        last = nn.Linear(64, outputs)
        nn.init.orthogonal_(last.weight, gain)
        nn.init.zeros_(last.bias)
        return nn.Sequential(*layers, last)


def collect(envs: gymnasium.vector.VectorEnv, agent: ActorCritic) -> dict[str, Tensor]:
    """One episode of every env, [K * B, ..]: what was seen and done, and what came of it."""
    observation, _ = envs.reset()
    features, actions, log_prob, values, rewards = [], [], [], [], []
    ended = False
    while not ended:
        seen = agent.features(observation)
        with torch.no_grad():
            policy = agent.policy(seen)
            action = policy.sample()
            values.append(agent.critic(seen)[:, 0])
        observation, reward, ends, _, _ = envs.step(action.numpy())
        features.append(seen)
        actions.append(action)
        log_prob.append(policy.log_prob(action).sum(1))
        rewards.append(torch.as_tensor(reward).float())
        ended = bool(ends.all())  # the episodes of this env are in step
    advantages = []
    advantage, later = (
        torch.zeros(len(values[0])),
        torch.zeros(len(values[0])),
    )  # no value at the end
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        advantage = reward + later - value + GAE_LAMBDA * advantage  # the return has no discount
        later = value
        advantages.insert(0, advantage)
    batch = {
        "features": torch.cat(features),
        "action": torch.cat(actions),
        "log_prob": torch.cat(log_prob),
        "advantage": torch.cat(advantages),
    }
    return batch | {"target": batch["advantage"] + torch.cat(values)}


def update(agent: ActorCritic, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    """Several epochs of the clipped objective (Schulman et al. 2017, arXiv 1707.06347)."""
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(batch["action"])).split(MINIBATCH):
            part = {name: values[rows] for name, values in batch.items()}
            log_prob = agent.policy(part["features"]).log_prob(part["action"]).sum(1)
            ratio = (log_prob - part["log_prob"]).exp()
            advantage = part["advantage"]
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            gain = torch.minimum(ratio * advantage, clipped * advantage).mean()
            error = (agent.critic(part["features"])[:, 0] - part["target"]).square().mean()
            optimizer.zero_grad()
            (0.5 * error - gain).backward()
            nn.utils.clip_grad_norm_(agent.parameters(), MOST_NORM)
            optimizer.step()


def train(steps: int, seed: int = 0) -> ActorCritic:
    """Train for about so many steps of the env."""
    torch.manual_seed(seed)
    envs = gymnasium.make_vec("ctrl_rl.envs:ctrl_rl/Mixture2d-v0", num_envs=EPISODES)
    envs.reset(seed=seed)
    space = envs.single_observation_space
    length = int(space["step"].n) - 1
    agent = ActorCritic(*space["x"].shape, length, int(space["control_group"].n))
    optimizer = torch.optim.Adam(agent.parameters(), lr=RATE, eps=1e-5)
    updates = max(1, steps // (EPISODES * length))
    for done in range(updates):
        optimizer.param_groups[0]["lr"] = RATE * (1 - done / updates)
        update(agent, optimizer, collect(envs, agent))
    return agent


def main(steps: int = 400_000, seed: int = 0) -> dict[str, Any]:
    """Train, and measure the mean action."""
    return ctrl_rl.evaluate_policy(TASK, train(steps, seed).act).summary


if __name__ == "__main__":
    summary = main(*map(int, sys.argv[1:]))
    print({name: summary[name] for name in ("gap_nats", "gap_nats_ci", "gap_nats_certified")})
