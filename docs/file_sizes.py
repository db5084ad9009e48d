"""PPO with the size of JPEG files as reward, on a small random Stable Diffusion, three seeds.

    python docs/file_sizes.py docs/pipelines.md

trains in `runs/file_sizes` (half an hour; what is finished is kept), draws
`file_sizes.png` beside the document and fills its table. Ends with an error where a class of a seed
does not move as it asks, by five standard errors or more. Settings: `tests/file_sizes.py`.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from results import fill

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from file_sizes import DIGEST, EDGES, SEEDS, Sizes, measured, pipeline, trained  # noqa: E402

ROOT = Path(__file__).parents[1] / "runs" / "file_sizes" / DIGEST
_ERRORS = 5  # standard errors that count as beyond noise


def class_name(label: int) -> str:
    """The range of a class in kB."""
    sizes = [f"{-edge:.2f}" for edge in EDGES]  # falling
    if label == 0:
        return f"above {sizes[0]}"
    return f"below {sizes[-1]}" if label == len(EDGES) else f"{sizes[label]} to {sizes[label - 1]}"


def table(found: Mapping[int, Sequence[Sizes]]) -> str:
    """A row per class, the seeds beside each other."""
    seeds = " | ".join(f"seed {seed}" for seed in found)
    lines = [
        f"| asked for, kB | mean of the prior, kB | {seeds} | in the class, prior | policies |",
        f"|---|---:|{'---:|' * len(found)}---:|---:|",
    ]
    for rows in zip(*found.values(), strict=True):
        first = rows[0]
        moves = " | ".join(f"{1000 * r.moved:+.0f} ± {1000 * r.error:.0f} B" for r in rows)
        shares = [r.share(r.policy) for r in rows]
        lines.append(
            f"| {class_name(first.label)} | {float(first.prior.mean()):.3f} | {moves} | "
            f"{first.share(first.prior):.0%} | {min(shares):.0%} to {max(shares):.0%} |"
        )
    return "\n".join(lines)


def draw(found: Mapping[int, Sequence[Sizes]], file: Path) -> None:
    """Sizes of every class, the prior's and the policies', with the ranges that were asked for."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    lowest, highest = 4.4, 5.3
    edges = [highest, *(-edge for edge in EDGES), lowest]
    for label, rows in enumerate(zip(*found.values(), strict=True)):
        axes.fill_between(
            [label - 0.45, label + 0.45],
            *edges[label : label + 2],
            color="tab:green",
            alpha=0.15,
            label="asked for" if label == 0 else None,
        )
        spread = [("prior", rows[0].prior, "0.6")]
        spread += [
            (f"PPO, seed {seed}", r.policy, "tab:blue") for seed, r in zip(found, rows, strict=True)
        ]
        for place, (name, sizes, colour) in enumerate(spread):
            x = label + 0.2 * (place - 1.5)
            part = axes.violinplot([sizes.numpy()], [x], widths=0.18, showextrema=False)
            for body in part["bodies"]:
                body.set(facecolor=colour, alpha=0.7, linewidth=0)
            named = name.split(",")[0] if label == 0 and place < 2 else None
            axes.plot(x, sizes.mean(), "o", color=colour, markersize=4, label=named)
    axes.set(
        xticks=range(len(EDGES) + 1),
        xticklabels=[f"size={y}" for y in range(len(EDGES) + 1)],
        ylabel="kB as a JPEG file",
        ylim=(lowest, highest),
    )
    axes.legend(frameon=False, ncols=3, loc="lower left")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(document: Path) -> None:
    """Train, measure, write."""
    torch.set_num_threads(1)
    prior = pipeline(ROOT / "prior")
    found = {seed: measured(trained(ROOT, prior, seed)) for seed in SEEDS}
    draw(found, document.parent / "file_sizes.png")
    fill(document, "file sizes", table(found))
    still = [
        f"seed {seed}, size={sizes.label}: {sizes.moved:+.4f} ± {sizes.error:.4f} kB"
        for seed, rows in found.items()
        for sizes in rows
        if not sizes.asked * sizes.moved > _ERRORS * sizes.error
    ]
    if still:
        sys.exit("not moved as asked: " + "; ".join(still))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
