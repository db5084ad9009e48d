"""Drawing labelled pictures in batches, each a function of the seed and its number."""

import csv
import io
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.conditions import label_counts
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.errors import ConfigError, check_sizes
from ctrl_rl.files import sync, write_text
from ctrl_rl.pixels import to_pixels
from ctrl_rl.policies import PriorPolicy

METADATA = "metadata.csv"
FILE_NAME = "file_name"  # what `datasets` calls the column
_MOST_BATCHES = 10_000_000
_PNG_END = b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class GenerationPlan:
    """How much to draw.

    Attributes:
        n: pictures.
        batch_size: drawn together; with the seed it decides what is drawn.
        seed: of the noise and the prompts.

    Raises:
        ConfigError: a size below 1 or a seed out of range.
    """

    n: int
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_sizes("", n=self.n, batch_size=self.batch_size)
        if not 0 <= self.seed < 2**63 // _MOST_BATCHES:
            raise ConfigError(f"seed={self.seed} must be 0 to {2**63 // _MOST_BATCHES - 1}")


class Drawing:
    """A data set that is being drawn, in batches that each follow from the seed and its number.

    Args:
        process: prior, kernel and the reward that labels.
        plan: how much to draw.
        folder: of the data set.

    Attributes:
        rows: of metadata.csv so far, without the heading.
    """

    def __init__(self, process: DenoisingProcess, plan: GenerationPlan, folder: Path) -> None:
        self.process, self.plan, self.folder = process, plan, folder
        prompts = process.prior.prompts
        self.columns = [FILE_NAME, *process.controls, *([keys.PROMPT] if prompts else [])]
        # What may stand in each column after the first.
        self.entries = [{*map(str, range(n))} for n in label_counts(process.controls).values()]
        if prompts:
            self.entries.append({*prompts.all})
        self.rows: list[list[str]] = []
        device = process.kernel.scale.device
        self.env = LatentEnv(process, num_envs=plan.batch_size, device=device)

    def resume(self) -> None:
        """Find the rows of an earlier call, in whole batches; a new folder has none.

        Raises:
            ConfigError: the table has other columns.
        """
        rows = self._stored()
        if len(rows) < self.plan.n:  # a batch that was interrupted is drawn anew
            rows = rows[: len(rows) // self.plan.batch_size * self.plan.batch_size]
        self.rows = rows

    def finish(self, report: Callable[[int], None]) -> None:
        """Draw what is missing; a row is written after its picture is on the disk.

        Args:
            report: called with the number of pictures, after every batch.
        """
        self._write_table()
        size = self.plan.batch_size
        lost = {
            place // size for place, row in enumerate(self.rows) if not _is_whole(self._file(row))
        }
        for number in sorted(lost):
            place = slice(number * size, min((number + 1) * size, len(self.rows)))
            rows = self._draw(number, len(self.rows[place]))
            if rows != self.rows[place]:  # another machine may round a label away
                self.rows[place] = rows
                self._write_table()
        with (self.folder / METADATA).open("a", newline="", encoding="utf-8") as file:
            while len(self.rows) < self.plan.n:
                done = len(self.rows)
                self.rows += self._draw(done // size, min(size, self.plan.n - done))
                file.write(_as_csv(self.rows[done:]))
                file.flush()
                report(len(self.rows))
        sync(self.folder / METADATA)

    @torch.no_grad()
    def _draw(self, number: int, count: int) -> list[list[str]]:
        """Draw a batch and write its first pictures; returns their rows."""
        # A function of the seed and the batch's number; no two seeds share a batch.
        self.env.set_seed(self.plan.seed * _MOST_BATCHES + number)
        process = self.process
        episode = rollout(self.env, PriorPolicy(process.kernel))
        samples = episode[keys.SAMPLE][:, -1]
        predicted = process.predict(samples)
        assert predicted is not None  # checked before
        columns = [predicted[name].tolist() for name in process.controls]
        prompts = process.prior.prompts
        if prompts:
            places = episode[keys.CONTROL, keys.PROMPT][:, 0].tolist()
            columns.append([prompts.all[place] for place in places])
        rows = []
        for place in range(count):
            name = _name(number * self.plan.batch_size + place)
            rows.append([name, *(str(column[place]) for column in columns)])
            _save_picture(self.folder / name, samples[place])
        for path in [*map(self._file, rows), self.folder]:
            sync(path)
        return rows

    def _stored(self) -> list[list[str]]:
        """The rows of metadata.csv up to the first that is not whole."""
        file = self.folder / METADATA
        if not file.is_file():
            return []
        content = file.read_bytes()
        text = content[: content.rfind(b"\n") + 1].decode("utf-8", errors="replace")
        table = csv.reader(io.StringIO(text, newline=""), strict=True)
        rows: list[list[str]] = []
        with suppress(csv.Error):  # such as a quote that is never closed
            head = next(table, self.columns)
            if head != self.columns:
                raise ConfigError(
                    f"{self.folder} has the columns {', '.join(head)}; give another out="
                )
            for row in table:
                known = zip(row, [{_name(len(rows))}, *self.entries], strict=False)
                if len(row) != len(head) or not all(entry in those for entry, those in known):
                    break
                rows.append(row)
        return rows

    def _write_table(self) -> None:
        write_text(self.folder / METADATA, _as_csv([self.columns, *self.rows]))

    def _file(self, row: list[str]) -> Path:
        return self.folder / row[0]


def _name(place: int) -> str:
    """Of the file of a picture."""
    return f"{place:06d}.png"


def _is_whole(file: Path) -> bool:
    """Whether there is a PNG file to its end."""
    try:
        with file.open("rb") as content:
            content.seek(-len(_PNG_END), os.SEEK_END)
            return content.read() == _PNG_END
    except OSError:  # there is none, or a shorter one
        return False


def _as_csv(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _save_picture(file: Path, sample: Tensor) -> None:
    """A sample [1 or 3, H, W] in [-1, 1] as a PNG file."""
    from PIL import Image

    Image.fromarray(to_pixels(sample).squeeze(-1).numpy(force=True)).save(file)
