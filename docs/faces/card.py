"""Hold the prior of faces to its data, and write the figures into its card.

    python docs/faces/card.py ctrl_rl/assets/faces/prior

Samples of the prior stand beside as many faces that it has never seen, of the splits of the judges:
how often there are glasses and hats, how many are copies of a training face, and how far the
features of a judge are from those of held-out faces (Heusel et al. 2017, arXiv 1706.08500, with
the judge's second-last layer in the place of Inception's). Floating-point sums differ between
machines in their last digits, and so may these figures.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from scipy import linalg
from torch import Tensor

from ctrl_rl.classifiers.classifier import Classifier
from ctrl_rl.data import as_float, faces_dataset
from ctrl_rl.kernels import ddpm_kernel
from ctrl_rl.priors import Prior, diffusers_unet_prior

COUNT, STEPS, BATCH = 2240, 50, 320
COPY = 0.06  # root mean square distance, of values in [-1, 1]: a few pixels of a face
START, END = "<!-- held to the data -->", "<!-- /held to the data -->"


@torch.no_grad()
def draw(prior: Prior) -> Tensor:
    """[COUNT, 3, 16, 16] samples by ancestral sampling."""
    kernel = ddpm_kernel(scheduler_config=prior.scheduler_config, num_steps=STEPS)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(COUNT // BATCH):
        x = torch.randn(BATCH, *prior.shape, generator=generator)
        for k in range(kernel.num_steps + int(kernel.has_read_out)):
            step = torch.full((BATCH,), k)
            mean = kernel.mean(x, prior.denoiser(x, kernel.timesteps[step]), step)
            x = mean + kernel.scale[k] * torch.randn(x.shape, generator=generator)
        batches.append(x.clamp(-1, 1))
    return torch.cat(batches)


def copies(x: Tensor, known: Tensor) -> float:
    """Share of images whose nearest known image is nearer than COPY."""
    distance = torch.cdist(x.flatten(1), known.flatten(1)).amin(1) / x[0].numel() ** 0.5
    return float((distance < COPY).double().mean())


@torch.no_grad()
def frechet(x: Tensor, y: Tensor, judges: list[Classifier]) -> float:
    """Frechet distance of Gaussians fitted to the judges' features of two sets of images."""
    moments = []
    for images in (x, y):
        parts = [judge.network.layers[:-1](images) for judge in judges]
        features = torch.cat(parts, 1).double().numpy()
        moments.append((features.mean(0), np.cov(features, rowvar=False)))
    (mean, cov), (other_mean, other_cov) = moments
    root = linalg.sqrtm(cov @ other_cov).real
    return float(((mean - other_mean) ** 2).sum() + np.trace(cov + other_cov - 2 * root))


def main(folder: Path) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    faces = {control: faces_dataset(control=control) for control in ("glasses", "hat")}
    judges = {c: Classifier.load(f"package://faces/{c}_heldout") for c in faces}
    trained = as_float(faces["hat"].split("prior")[0])
    unseen = as_float(faces["hat"].split("glasses")[0])[:COUNT]
    others = as_float(faces["hat"].split("hat")[0])[:COUNT]
    drawn = draw(diffusers_unet_prior(path=str(folder)))

    def share(images: Tensor, control: str) -> float:
        return float((judges[control].log_probabilities(images).argmax(1) == 1).double().mean())

    both = (drawn, unseen)
    figures = {f"{c}, by a judge": [f"{share(x, c):.1%}" for x in both] for c in judges}
    figures["copies of a training face"] = [f"{copies(x, trained):.2%}" for x in both]
    distances = [f"{frechet(x, others, list(judges.values())):.2f}" for x in both]
    figures["Fréchet distance to other held-out faces"] = distances
    text = f"""{START}
Held to the data: {COUNT:,} samples of {STEPS} steps beside {COUNT:,} faces that it has never seen
(`python docs/faces/card.py`). A copy is nearer than {COPY} to a training face, in root mean square
of values in [-1, 1].

| | samples | held-out faces |
|---|---:|---:|
"""
    text += "\n".join(f"| {name} | {' | '.join(pair)} |" for name, pair in figures.items())
    text += f"\n{END}"
    card = folder / "README.md"
    before, _, rest = card.read_text().partition(START)
    rest = rest.partition(END)[2] if rest else ""
    card.write_text(f"{before.rstrip()}\n\n{text}\n{rest.lstrip()}")
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
