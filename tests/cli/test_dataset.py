"""`ctrl-rl dataset`: pictures of the prior with the reward's labels, and the way back."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny_pipeline
from PIL import Image
from pipelines import MAKERS

from ctrl_rl import keys
from ctrl_rl.cli.main import main
from ctrl_rl.data import image_dataset
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.policies import PriorPolicy
from ctrl_rl.runs.compose import compose

WORDS = ["env=digits", "kernel.num_steps=3", "batch_size=16"]


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metadata.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def same(first: Path, second: Path) -> bool:
    names = sorted(file.name for file in first.iterdir())
    assert names == sorted(file.name for file in second.iterdir())
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


@torch.no_grad()
def test_pictures_are_the_priors_and_labels_the_rewards(tmp_path, capsys):
    from ctrl_rl.runs import build

    folder = tmp_path / "drawn"
    assert main(["dataset", *WORDS, "n=40", f"out={folder}"]) == 0
    rows = table(folder)
    assert len(rows) == 40 == len(list(folder.glob("*.png")))
    told = capsys.readouterr().err
    counts = [sum(row["digit"] == str(label) for row in rows) for label in range(10)]
    assert ", ".join(f"{label} x {n}" for label, n in enumerate(counts)) in told

    process = build.build_process(compose("dataset", WORDS))
    env = LatentEnv(process, num_envs=16, seed=1)  # of the second batch
    sample = rollout(env, PriorPolicy(process.kernel))[keys.SAMPLE][:, -1]
    labels = process.reward_model.predict(sample)["digit"]
    for place in range(16):
        row = rows[16 + place]
        assert row["digit"] == str(int(labels[place]))
        expected = (sample[place, 0].clamp(-1, 1) * 127.5 + 127.5).round().byte().numpy()
        assert (pixels(folder / row["file_name"]) == expected).all()


def test_it_goes_on_as_if_never_interrupted(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main(["dataset", *WORDS, "n=40", f"out={whole}"]) == 0
    assert main(["dataset", *WORDS, "n=20", f"out={part}"]) == 0
    assert main(["dataset", *WORDS, "n=40", f"out={part}"]) == 0
    assert same(part, whole)
    lines = (part / "metadata.csv").read_text().splitlines()
    (part / "metadata.csv").write_text("\n".join(lines[:25])[:-3])  # killed within a batch
    for file in sorted(part.glob("*.png"))[30:]:
        file.unlink()
    assert main(["dataset", *WORDS, "n=40", f"out={part}"]) == 0
    assert same(part, whole)


def test_prompts_are_kept_and_a_classifier_reads_the_folder(tmp_path, capsys):
    pytest.importorskip("transformers")
    folder = tmp_path / "drawn"
    edges = "reward.classifiers.size.edges=[-0.856]"
    words = ["env=digits", "prior=diffusers", f"prior.path={MAKERS['sd'](tmp_path / 'sd')}"]
    words += ["prior.prompts=[a cat, 'a, red \"fox\"']", "kernel=ddim", "kernel.num_steps=3"]
    words += ["reward=jpeg", edges, "~evaluation.heldout.digit", "n=64", f"out={folder}"]
    assert main(["dataset", *words]) == 0
    rows = table(folder)
    assert [sum(row["prompt"] == text for row in rows) for text in ("a cat", 'a, red "fox"')] == [
        32,
        32,
    ]
    sizes = [row["size"] for row in rows]
    assert set(sizes) == {"0", "1"}, "the edge lies within what this prior draws"

    dataset = image_dataset(path=folder, label="size")
    assert dataset.x.shape == (64, 3, 16, 16) and dataset.num_labels == 2
    assert dataset.labels.tolist() == [int(size) for size in sizes]
    first = torch.from_numpy(pixels(folder / "000000.png").copy()).permute(2, 0, 1)
    assert torch.equal(dataset.x[0], first)


def test_a_classifier_fitted_on_the_folder_is_a_reward(tmp_path, capsys):
    folder, fitted = tmp_path / "drawn", tmp_path / "fitted"
    assert main(["dataset", "env=digits", "n=400", "batch_size=100", f"out={folder}"]) == 0
    words = ["dataset=images", f"dataset.path={folder}", "dataset.label=digit"]
    words += ["dataset.num_labels=10", "classifier=images", "classifier.network.num_labels=10"]
    words += ["classifier.network.channels=1", "classifier.epochs=5", f"out={fitted}"]
    assert main(["classifier", *words]) == 0
    assert json.loads((fitted / "report.json").read_text())["accuracy"] > 0.3  # chance: 0.1
    words = ["env=digits", f"reward.classifiers.digit.folder={fitted}", "trainer.updates=1"]
    words += ["evaluation.prior_samples=8", "evaluation.policy_samples=3", f"run.root={tmp_path}"]
    assert main(["train", *words, "run.name=run"]) == 0
    capsys.readouterr()
    small = save_tiny_pipeline(tmp_path / "small")
    words += ["prior=diffusers", f"prior.path={small}", "~evaluation.heldout.digit"]
    assert main(["train", *words, "run.name=other"]) == 2
    assert "fitted on examples of shape [1, 8, 8] and is asked" in capsys.readouterr().err


REFUSED = {
    "drawn with another seed (0, now 3)": ["n=40", "seed=3"],
    "drawn with another batch_size (16, now 8)": ["n=40", "batch_size=8"],
    "drawn with another kernel": ["n=40", "kernel.num_steps=4"],
    "n=0 must be 1 or more": ["n=0"],
    "n=many": ["n=many"],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_another_dataset_in_the_folder_is_refused(reason, tmp_path, capsys):
    folder = tmp_path / "drawn"
    assert main(["dataset", *WORDS, "n=16", f"out={folder}"]) == 0
    before = {file: file.read_bytes() for file in folder.iterdir()}
    capsys.readouterr()
    assert main(["dataset", *WORDS, *REFUSED[reason], f"out={folder}"]) == 2
    assert reason in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in folder.iterdir()}


def test_what_cannot_be_drawn_is_refused_before_a_folder_is_made(tmp_path, capsys):
    folder = tmp_path / "drawn"
    assert main(["dataset", "env=gaussian", f"out={folder}"]) == 2
    assert "are no images; a dataset of pictures needs" in capsys.readouterr().err
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    assert main(["dataset", *WORDS, "n=4", f"out={folder}"]) == 2
    assert "is no dataset of ours and not empty" in capsys.readouterr().err
    (folder / "dataset.json").write_text("{")
    assert main(["dataset", *WORDS, "n=4", f"out={folder}"]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_description_says_what_was_drawn(tmp_path):
    folder = tmp_path / "drawn"
    assert main(["dataset", *WORDS, "n=4", f"out={folder}"]) == 0
    told = json.loads((folder / "dataset.json").read_text())
    assert told["n"] == 4 and told["kernel"]["num_steps"] == 3
    assert told["prior"]["_target_"] == "ctrl_rl.priors.diffusers_unet_prior"
