"""Environments: the denoising MDP as a TorchRL env and as Gymnasium envs.

Import the classes from their modules (`ctrl_rl.envs.latent`, `ctrl_rl.envs.control`): this file is
loaded by every `import gymnasium` through the registration and stays free of heavy imports.
"""
