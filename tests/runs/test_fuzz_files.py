"""A short run of tests/fuzz_files.py, and what its long runs (`make fuzz`) found."""

import json
import os
import shutil

import fuzz_files
import pytest
import torch
from children import command, warm_up
from running import train
from safetensors.torch import load_file, save_file

from ctrl_rl import load_run
from ctrl_rl.assets import resolve
from ctrl_rl.classifiers.classifier import Classifier
from ctrl_rl.errors import ConfigError, RunError
from ctrl_rl.files import read_json, read_rows, read_tensors
from ctrl_rl.priors import diffusers_unet_prior
from ctrl_rl.runs.folder import Run

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
def test_hostile_files_are_refused_or_of_no_effect(tmp_path):
    warm_up()
    chosen = ["sample", "resume", "arrays"]
    found = fuzz_files.trials(10, 3, tmp_path, chosen)
    assert [(story, fault) for story, _, fault in found if fault] == []


@pytest.fixture
def run(tmp_path):
    return train(tmp_path, "run", "trainer.updates=2", "trainer.checkpoint_every=1")


NEVER_ENDS = {
    "pipe": os.mkfifo,
    "device": lambda file: file.symlink_to("/dev/zero"),
    "hole": lambda file: (file.touch(), os.truncate(file, 2**40)),
}


@needs_fork
@pytest.mark.parametrize("kind", NEVER_ENDS)
@pytest.mark.parametrize(
    "name", ["state.json", "policy.safetensors", "training.safetensors", "config.yaml"]
)
def test_what_never_ends_is_not_read(run, kind, name):
    warm_up()
    folder = run if name == "config.yaml" else run / "checkpoints" / "000002"
    (folder / name).unlink()
    NEVER_ENDS[kind](folder / name)
    called = command(["sample", f"run={run}", "control=1", "n=1"], most_s=20)
    assert called.fault() is None and called.code == 2, called
    assert str(folder if name != "config.yaml" else run) in called.last


@pytest.mark.parametrize("kind", NEVER_ENDS)
def test_a_marker_that_never_ends_is_no_marker(run, kind):
    file = run / ".ctrl_rl" / "run.json"
    file.unlink()
    NEVER_ENDS[kind](file)
    assert Run.open(run).id is None


@pytest.mark.parametrize("name", ["policy.safetensors", "training.safetensors"])
def test_weights_that_are_not_finite_are_damage(tmp_path, name):
    run = train(tmp_path, "run", "trainer.updates=2", "trainer.ema_decay=0.5")
    folder = run / "checkpoints" / "000002"
    tensors = load_file(folder / name)
    drawn_from = "average." if name.startswith("training") else ""
    first = next(key for key in tensors if key.startswith(drawn_from) and "weight" in key)
    tensors[first][0] = torch.nan
    save_file(tensors, folder / name)
    fuzz_files.hostile._rehashed(folder / name)
    with pytest.raises(RunError, match=f"000002 is damaged .*{first} is not finite"):
        load_run(run)


@pytest.mark.parametrize(
    "line", ["", "[]", "3", '{"reward": "x"}', '{"reward": NaN}', "[" * 5000, '{"reward": [1]}']
)
def test_metrics_that_are_damaged_are_refused_by_line(run, line):
    file = run / "metrics.jsonl"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(RunError, match=r"metrics.jsonl cannot be read \(line 3 holds no numbers"):
        list(Run.open(run).metrics())


def test_null_in_metrics_is_a_figure_that_there_is_not(run):
    (run / "metrics.jsonl").write_text('{"update": 1, "reward": null}\n')
    assert list(Run.open(run).metrics()) == [{"update": 1, "reward": None}]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_prior_of_weights_that_are_not_finite_is_refused_by_file(tmp_path, value):
    folder = shutil.copytree(str(resolve("package://digits/prior")), tmp_path / "prior")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"][0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"diffusion_pytorch_model.safetensors: conv_in.bias"):
        diffusers_unet_prior(path=str(folder))


def test_a_classifier_is_refused_by_its_folder(tmp_path):
    folder = shutil.copytree(str(resolve("package://digits/classifier")), tmp_path / "judge")
    about = json.loads((folder / "classifier.json").read_text())
    (folder / "classifier.json").write_text(json.dumps(about | {"label_names": ["a"] * 10}))
    with pytest.raises(ConfigError, match=f"{folder}: label_names"):
        Classifier.load(str(folder))
    (folder / "classifier.json").write_text(json.dumps(about))
    tensors = load_file(folder / "classifier.safetensors")
    first = next(iter(tensors))
    save_file(tensors | {first: torch.full_like(tensors[first], torch.nan)}, tmp_path / "odd")
    (tmp_path / "odd").replace(folder / "classifier.safetensors")
    with pytest.raises(ConfigError, match=f"{folder} is corrupt .*{first} is not finite"):
        Classifier.load(str(folder))


def test_files_are_read_whole_or_refused(tmp_path):
    file = tmp_path / "file"
    with pytest.raises(OSError, match="No such file"):
        read_json(file)
    with pytest.raises(OSError, match="is a folder, and not a file"):
        read_json(tmp_path)
    os.mkfifo(file)
    for read in (read_json, read_rows, read_tensors):
        with pytest.raises(OSError, match="file is a pipe or a device"):
            read(file)
    file.unlink()
    file.write_text("[" * 50_000)
    with pytest.raises(ValueError, match="nested too deep"):
        read_json(file)
    os.truncate(file, 2**40)
    with pytest.raises(OSError, match="has 1,099,511,627,776 bytes"):
        read_json(file)
