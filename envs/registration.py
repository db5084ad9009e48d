"""Ids of the Gymnasium environments.

Gymnasium calls `register_envs` at `import gymnasium` (entry point `gymnasium.envs`), also in
programs that never use this project: so entry points are strings and nothing heavy is imported.
"""

# Gymnasium id -> name of the yaml in configs/env. The version rises when results change.
TASKS = {
    "ctrl_rl/Digits-v0": "digits",
    "ctrl_rl/Gaussian-v0": "gaussian",
    "ctrl_rl/Mixture1d-v0": "mixture1d",
    "ctrl_rl/Mixture2d-v0": "mixture2d",
}


def register_envs() -> None:
    """Register every task with Gymnasium."""
    import gymnasium

    for env_id, task in TASKS.items():
        gymnasium.register(
            id=env_id,
            entry_point="ctrl_rl.api:make_control_env",
            vector_entry_point="ctrl_rl.api:make_control_vector_env",
            kwargs={"task": task},
        )
