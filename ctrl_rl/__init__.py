"""Steer a pretrained diffusion model with soft reinforcement learning, certified in nats.

Importing this package is cheap: heavy modules load on first use. Gymnasium imports every registered
plug-in, and `ctrl-rl --help` should answer at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctrl_rl.export.pipeline import ControlledPipeline as ControlledPipeline
    from ctrl_rl.integrations.evaluation import evaluate_policy as evaluate_policy
    from ctrl_rl.runs.loaded import LoadedRun as LoadedRun
    from ctrl_rl.runs.loaded import load_run as load_run
    from ctrl_rl.runs.loaded import make_env as make_env

__version__ = "0.1.0"
__all__ = [
    "ControlledPipeline",
    "LoadedRun",
    "__version__",
    "evaluate_policy",
    "load_run",
    "make_env",
]


def __getattr__(name: str) -> Any:
    if name in ("LoadedRun", "load_run", "make_env"):
        return getattr(import_module("ctrl_rl.runs.loaded"), name)
    if name == "ControlledPipeline":
        return import_module("ctrl_rl.export.pipeline").ControlledPipeline
    if name == "evaluate_policy":
        return import_module("ctrl_rl.integrations.evaluation").evaluate_policy
    raise AttributeError(f"module 'ctrl_rl' has no attribute '{name}'")
