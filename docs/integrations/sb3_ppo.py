"""PPO of stable-baselines3 on the control env, and the certified gap of what it learned.

python docs/integrations/sb3_ppo.py [STEPS] [SEED]
"""

import sys
from typing import Any

import gymnasium
from stable_baselines3 import PPO

import ctrl_rl
from ctrl_rl.integrations.sb3 import ControlVecEnv, actions_of

TASK = "mixture2d"


def train(steps: int, seed: int = 0) -> PPO:
    """Train for about so many steps of the env."""
    envs = ControlVecEnv(gymnasium.make_vec("ctrl_rl.envs:ctrl_rl/Mixture2d-v0", num_envs=256))
    model = PPO(
        "MultiInputPolicy",
        envs,
        n_steps=20,  # an episode
        batch_size=512,
        n_epochs=10,
        learning_rate=lambda left: 2e-3 * left,
        gamma=1.0,  # the plain return is the soft return J
        gae_lambda=0.95,
        policy_kwargs={"log_std_init": -1.0, "net_arch": [64, 64]},  # the env has noise already
        seed=seed,
        device="cpu",
    )
    return model.learn(steps)


def main(steps: int = 400_000, seed: int = 0) -> dict[str, Any]:
    """Train, and measure the mean action."""
    return ctrl_rl.evaluate_policy(TASK, actions_of(train(steps, seed))).summary


if __name__ == "__main__":
    summary = main(*map(int, sys.argv[1:]))
    print({name: summary[name] for name in ("gap_nats", "gap_nats_ci", "gap_nats_certified")})
