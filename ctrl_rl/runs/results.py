"""What an evaluation leaves in a folder: pictures, the film, summary.json; and its table."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ctrl_rl.evaluation.evaluate import Evaluation
from ctrl_rl.evaluation.film import NO_FILM, draw_film, strips_of
from ctrl_rl.evaluation.numbers import draw_asked
from ctrl_rl.evaluation.pictures import draw_samples
from ctrl_rl.evaluation.quality import in_words
from ctrl_rl.evaluation.side_by_side import Comparison
from ctrl_rl.runs.folder import write_summary
from ctrl_rl.runs.progress import say, show_summary


def write_results(
    folder: Path,
    config: DictConfig,
    cost: dict[str, Any],
    evaluation: Evaluation,
    compared: Sequence[Comparison],
    *,
    quiet: bool = False,
) -> None:
    """Write pictures and, last, summary.json; print the table.

    They include denoising.gif if latents are images, and asked.png if a control is a number.
    """
    method = config.choices.get("method")
    agent = method or config.choices.agent
    head = {"task": config.env.name, "agent": agent, "seed": config.seed}
    paid = {"denoiser_calls_budget": config.trainer.get("denoiser_calls")}
    machine = {"device": config.device, "torch": torch.__version__, "cores": os.cpu_count()}
    summary = {**head, **cost, **paid, **evaluation.summary, "machine": machine}
    lines = {}
    for source in evaluation.samples:
        parts = [in_words(summary if source == "policy" else summary[source])]
        if source == "policy":
            parts.append(f"gap {summary['gap_nats']:.2f} nats")
        lines[source] = "\n".join(part for part in parts if part)
    title = f"{config.run.name}: {head['agent']} on {head['task']}"
    draw_samples(
        folder / "samples.png",
        compared=compared,
        samples=evaluation.samples,
        title=title,
        figures=lines,
    )
    figures_of = evaluation.summary["per_label"]
    rows = [
        (asked, figures_of[name])
        for asked, name in zip(evaluation.asked, evaluation.conditions, strict=True)
    ]
    draw_asked(folder / "asked.png", rows, title=title)
    has_film = draw_film(folder / "denoising.gif", strips_of(compared))
    write_summary(folder, summary)
    if not quiet:
        show_summary(folder, summary)
        if not has_film and compared[0].before.samples.ndim == 4:
            say(NO_FILM)
        gap, before = summary["gap_nats"], summary["prior"]["gap_nats"]
        if gap > before and method is None:
            say(
                f"worse than no training: the gap is {gap:.2f} nats, the prior's {before:.2f};\n"
                "try lower rates in trainer.learning_rate, or more of trainer.warmup"
            )
