"""TorchRL's loggers of figures, beside metrics.jsonl, which is always written.

A logger of your own is a class with `open(folder, run_id, update)`, and `log_scalar(name, value,
step)` on what that returns. A run that is resumed opens its logger at the checkpoint's update: what
was logged after it is taken back first, as it comes again.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ctrl_rl.errors import ConfigError
from ctrl_rl.files import write_text

_NAME = "log"  # of the folder below the run's


class Logger(Protocol):
    """What `open` returns."""

    def log_scalar(self, name: str, value: float, step: int | None = None) -> None:
        """Log one figure of an update."""


class NoLog:
    """metrics.jsonl and nothing else."""

    def open(self, folder: Path, run_id: str | None, update: int) -> Logger | None:
        """No logger."""
        del folder, run_id, update
        return None


class CsvLog:
    """One csv file per figure, below log/."""

    def open(self, folder: Path, run_id: str | None, update: int) -> Logger:
        """Open it, cut back to an update.

        Args:
            folder: of the run.
            run_id: not used.
            update: number of finished updates.
        """
        del run_id
        from torchrl.record import CSVLogger

        for file in (folder / _NAME / "scalars").glob("*.csv"):
            lines = file.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n") and "," in line]
            write_text(file, "".join(line for line in whole if int(line.split(",")[0]) <= update))
        logger: Logger = CSVLogger(exp_name=_NAME, log_dir=str(folder))
        return logger


class TensorboardLog:
    """Events for TensorBoard, below log/: `tensorboard --logdir runs`."""

    def open(self, folder: Path, run_id: str | None, update: int) -> Logger:
        """Open it; TensorBoard drops the events after an update that were there before.

        Args:
            folder: of the run.
            run_id: not used.
            update: number of finished updates.
        """
        del run_id
        from torch.utils.tensorboard import SummaryWriter
        from torchrl.record import TensorboardLogger

        if (folder / _NAME).is_dir():
            # Writes the event that says from where on earlier ones do not count.
            SummaryWriter(str(folder / _NAME), purge_step=update + 1).close()
        logger: Logger = TensorboardLogger(exp_name=_NAME, log_dir=str(folder))
        return logger


class WandbLog:
    """Weights & Biases; a run that is resumed goes on under its id.

    Args:
        project: of W&B.
        offline: True writes locally, for `wandb sync`.
        **more: for `wandb.init`, such as entity or tags.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, *, project: str, offline: bool = False, **more: Any) -> None:
        if find_spec("wandb") is None:
            raise ConfigError("logger=wandb needs a package that is not here: pip install wandb")
        self.project, self.offline, self.more = project, offline, more

    def open(self, folder: Path, run_id: str | None, update: int) -> Logger:
        """Start or resume the run.

        Args:
            folder: of the run.
            run_id: unique in the project; None for a new one of W&B's.
            update: not used: W&B shows the later line of a step that comes again.
        """
        del update
        from torchrl.record import WandbLogger

        logger: Logger = WandbLogger(
            exp_name=folder.name,
            save_dir=str(folder),
            id=run_id,
            project=self.project,
            offline=self.offline,
            **self.more,
        )
        return logger
