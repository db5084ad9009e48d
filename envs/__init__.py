"""Environments: the denoising MDP as a TorchRL env and as Gymnasium envs.

Import the classes from their modules (`ctrl_rl.envs.latent`, `ctrl_rl.envs.control`): this file
registers the Gymnasium ids, for ``gymnasium.make("ctrl_rl.envs:ctrl_rl/Digits-v0")``, and stays
free of heavy imports.
"""

from ctrl_rl.envs.registration import register_envs

register_envs()
