"""Ids of the Gymnasium environments.

Importing `ctrl_rl.envs` registers them. Gymnasium 1.0 dropped the plug-ins that made ids known at
`import gymnasium`. It now takes the module in front of the id, or an import before `make`::

    gymnasium.make("ctrl_rl.envs:ctrl_rl/Digits-v0")

Entry points are strings: registration imports nothing heavy.
"""

import gymnasium

# Gymnasium id -> name of the yaml in configs/env. The version rises when results change.
TASKS = {
    "ctrl_rl/Digits-v0": "digits",
    "ctrl_rl/Faces-v0": "faces",
    "ctrl_rl/Gaussian-v0": "gaussian",
    "ctrl_rl/GaussianMean-v0": "gaussian_mean",
    "ctrl_rl/Images-v0": "images",
    "ctrl_rl/Mixture1d-v0": "mixture1d",
    "ctrl_rl/Mixture2d-v0": "mixture2d",
    "ctrl_rl/SdAesthetic-v0": "sd_aesthetic",
    "ctrl_rl/SdCompressibility-v0": "sd_compressibility",
    "ctrl_rl/SdMultitask-v0": "sd_multitask",
}


def register_envs() -> None:
    """Register every task with Gymnasium; a second call does nothing."""
    for env_id, task in TASKS.items():
        if env_id not in gymnasium.registry:
            gymnasium.register(
                id=env_id,
                entry_point="ctrl_rl.runs.loaded:make_control_env",
                vector_entry_point="ctrl_rl.runs.loaded:make_control_vector_env",
                kwargs={"task": task},
            )
