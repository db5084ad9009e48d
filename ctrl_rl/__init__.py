"""Steer a pretrained diffusion model with soft reinforcement learning, certified in nats.

Importing this package is cheap: heavy modules load on first use. Gymnasium imports every registered
plug-in, and `ctrl-rl --help` should answer at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctrl_rl.export.pipeline import ControlledPipeline as ControlledPipeline
    from ctrl_rl.integrations.evaluation import evaluate_policy as evaluate_policy
    from ctrl_rl.runs.api import train as train
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
    "train",
]
_HOMES = {
    "ControlledPipeline": "ctrl_rl.export.pipeline",
    "LoadedRun": "ctrl_rl.runs.loaded",
    "evaluate_policy": "ctrl_rl.integrations.evaluation",
    "load_run": "ctrl_rl.runs.loaded",
    "make_env": "ctrl_rl.runs.loaded",
    "train": "ctrl_rl.runs.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ctrl_rl' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
