"""Folders that are odd, broken or hostile: one line that names the file, and nothing is run."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import MAKERS
from safetensors.torch import load_file, save_file

from ctrl_rl.assets import resolve
from ctrl_rl.errors import ConfigError
from ctrl_rl.kernels import ddim_kernel
from ctrl_rl.priors import Prior, diffusers_prior, diffusers_unet_prior
from ctrl_rl.runs.build import build_process
from ctrl_rl.runs.compose import compose

SCHEDULER = "scheduler/scheduler_config.json"
TEXT = {"prompts": ["cat"], "size": [16, 16]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path) -> dict[str, Path]:
    """A pipeline of each kind; not to be written to."""
    folder = tmp_path_factory.mktemp("folders")
    texts = {kind: MAKERS[kind](folder / kind) for kind in ("sd", "sd3")}
    unet = Path(shutil.copytree(tiny_pipeline, folder / "unet"))
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"]}
    (unet / "model_index.json").write_text(json.dumps(index))
    return {"unet": unet, **texts}


@pytest.fixture(params=["unet", "sd", "sd3"])
def folder(request: pytest.FixtureRequest, made: dict[str, Path], tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    return Path(shutil.copytree(made[request.param], tmp_path / request.param))


def read(folder: Path, **settings: Any) -> Prior:
    text = {} if folder.name == "unet" else TEXT
    return diffusers_prior(path=str(folder), **text, **settings)


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: each for key, each in content.items() if each != "gone"}))


def refusal(folder: Path, **settings: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        read(folder, **settings)
    told = str(raised.value)
    assert "\n" not in told and f"prior.path={folder}" in told
    return told


CLASSES = (
    *("EDMEulerScheduler", "CMStochasticIterativeScheduler", "FlowMatchHeunDiscreteScheduler"),
    *("LCMScheduler", "KarrasVeScheduler", "ScoreSdeVeScheduler", "TCDScheduler"),
)


@pytest.mark.parametrize("name", CLASSES)
def test_schedulers_of_another_law_are_refused_by_name(folder: Path, name: str) -> None:
    edit(folder / SCHEDULER, _class_name=name)
    told = refusal(folder)
    assert SCHEDULER in told and f"scheduler {name} is not read" in told and "DDPMScheduler" in told
    edit(folder / "model_index.json", scheduler=["diffusers", name])
    assert f"scheduler {name} is not read" in refusal(folder)


def test_two_files_that_name_two_schedulers_are_refused(folder: Path) -> None:
    before = json.loads((folder / SCHEDULER).read_text())["_class_name"]
    edit(folder / "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])
    told = refusal(folder)
    assert SCHEDULER in told and f"is {before}'s, and model_index.json names EDM" in told
    if folder.name == "unet":
        read(folder, scheduler={"_class_name": before})


def test_without_a_class_of_its_own_the_scheduler_is_the_pipelines(folder: Path) -> None:
    edit(folder / SCHEDULER, _class_name="gone")
    read(folder)
    edit(folder / "model_index.json", scheduler=["diffusers", "TCDScheduler"])
    assert "scheduler TCDScheduler is not read" in refusal(folder)


DAMAGED = {
    "missing": (None, f"has no {SCHEDULER}"),
    "truncated": ('{"beta_start": 0.', f"{SCHEDULER} is no json"),
    "empty": ("", f"{SCHEDULER} is no json"),
    "binary": (b"\xff\xfe\x00", f"{SCHEDULER} is no json"),
    "deep": ("[" * 100_000, f"{SCHEDULER} is no json"),
    "a list": ("[1, 2]", f"{SCHEDULER} holds no settings"),
    "a word": ('"DDPMScheduler"', f"{SCHEDULER} holds no settings"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_scheduler_config_is_named(folder: Path, how: str) -> None:
    content, reason = DAMAGED[how]
    file = folder / SCHEDULER
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert reason in refusal(folder)


@pytest.mark.parametrize("timesteps", [10**12, float("nan"), -5, "1000", None, [1000]], ids=str)
def test_timesteps_out_of_range_are_refused_before_anything_is_made(
    folder: Path, timesteps: Any
) -> None:
    edit(folder / SCHEDULER, num_train_timesteps=timesteps)
    assert f"{SCHEDULER}: the scheduler's num_train_timesteps=" in refusal(folder)


@pytest.mark.parametrize("beta", [-0.1, 0, 1.5, float("nan"), float("inf"), "0.1", None], ids=str)
def test_betas_out_of_range_are_refused(made: dict[str, Path], tmp_path: Path, beta: Any) -> None:
    folder = Path(shutil.copytree(made["unet"], tmp_path / "unet"))
    for key in ("beta_start", "beta_end"):
        edit(folder / SCHEDULER, beta_start=0.0001, beta_end=0.02)
        edit(folder / SCHEDULER, **{key: beta})
        assert f"{SCHEDULER}: the scheduler's {key}=" in refusal(folder)


def test_a_spacing_that_no_kernel_follows_is_refused_and_can_be_left_out(
    made: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made["sd"], tmp_path / "sd"))
    edit(folder / SCHEDULER, _class_name="DPMSolverMultistepScheduler", use_karras_sigmas=True)
    edit(folder / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    told = refusal(folder)
    assert "use_karras_sigmas=True" in told and "prior.scheduler={use_karras_sigmas:false}" in told
    for changes in ({"use_karras_sigmas": False}, {"use_karras_sigmas": None}):
        prior = read(folder, scheduler=changes)
        expected = read(made["sd"])  # of a PNDMScheduler with the same betas
        kernels = [
            ddim_kernel(scheduler_config=p.scheduler_config, num_steps=5) for p in (prior, expected)
        ]
        assert torch.equal(kernels[0].timesteps, kernels[1].timesteps)
        assert torch.equal(kernels[0].scale, kernels[1].scale)


def test_settings_of_the_scheduler_can_be_changed(folder: Path) -> None:
    if folder.name == "sd3":
        assert read(folder, scheduler={"shift": 2.0}).scheduler_config["shift"] == 2.0
        return
    prior = read(folder, scheduler={"timestep_spacing": "linspace", "beta_end": 0.015})
    kernel = ddim_kernel(scheduler_config=prior.scheduler_config, num_steps=3)
    assert kernel.timesteps[0] == 999
    assert prior.scheduler_config["beta_end"] == 0.015
    assert "must be a number between 0 and 1" in refusal(folder, scheduler={"beta_end": 7})
    with pytest.raises(ConfigError, match="prior.scheduler=linspace must have settings"):
        read(folder, scheduler="linspace")


def test_the_command_line_changes_settings_of_the_scheduler(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(resolve("package://digits/prior"), tmp_path / "digits"))
    edit(folder / SCHEDULER, _class_name="DPMSolverMultistepScheduler", use_karras_sigmas=True)
    edit(folder / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    words = ["env=digits", f"prior.path={folder}"]
    with pytest.raises(ConfigError) as raised:
        build_process(compose("train", words))
    told = str(raised.value)
    assert f"prior.path={folder}, {SCHEDULER}: the scheduler's use_karras_sigmas=True" in told
    fix = told.rpartition(" or by ")[2]
    process = build_process(compose("train", [*words, fix]))
    expected = build_process(compose("train", ["env=digits"]))
    assert torch.equal(process.kernel.scale, expected.kernel.scale)


@pytest.mark.parametrize("name", ["WarpPipeline", "AudioLDMPipeline", 5, None, "gone"], ids=str)
def test_a_pipeline_that_is_not_known_is_refused(folder: Path, name: Any) -> None:
    edit(folder / "model_index.json", _class_name=name)
    with pytest.raises(ConfigError, match="model_index.json names no pip|unknown the pipeline of"):
        read(folder)


@pytest.mark.parametrize("content", ["{", "[]", "5"])
def test_a_damaged_index_is_named(folder: Path, content: str) -> None:
    (folder / "model_index.json").write_text(content)
    assert "model_index.json" in refusal(folder)


class Trap:
    """What a pickle may do when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize(
    ("kind", "weights", "pickled"),
    [
        ("unet", "unet/diffusion_pytorch_model", "diffusion_pytorch_model.bin"),
        ("sd", "unet/diffusion_pytorch_model", "diffusion_pytorch_model.bin"),
        ("sd", "text_encoder/model", "pytorch_model.bin"),
        ("sd", "vae/diffusion_pytorch_model", "diffusion_pytorch_model.bin"),
    ],
)
def test_pickled_weights_are_refused_and_not_loaded(
    made: dict[str, Path], tmp_path: Path, kind: str, weights: str, pickled: str
) -> None:
    folder = Path(shutil.copytree(made[kind], tmp_path / kind))
    file = folder / f"{weights}.safetensors"
    mark = tmp_path / "run"
    (file.parent / pickled).write_bytes(pickle.dumps({"weight": Trap(mark)}))
    file.unlink()
    told = refusal(folder)
    assert f"no safetensors beside {pickled} in {file.parent}" in told
    assert "use_safetensors=False" in told and "save_pretrained" in told
    assert not mark.exists()


def test_code_in_the_folder_is_not_run(made: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made["sd"], tmp_path / "sd"))
    mark = tmp_path / "run"
    (folder / "unet" / "mine.py").write_text(f"open({str(mark)!r}, 'w')\nclass Mine: pass\n")
    edit(folder / "model_index.json", unet=["mine", "Mine"])
    assert "cannot be read as a StableDiffusionPipeline" in refusal(folder)
    assert not mark.exists()


def test_weights_that_are_missing_are_not_drawn_at_random(
    made: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made["unet"], tmp_path / "unet"))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_out.weight"], weights["conv_out.bias"]
    save_file(weights, file)
    assert "lacks conv_out.bias and 1 more weights" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"sample_size": null}'])
def test_a_damaged_unet_config_is_named(
    made: dict[str, Path], tmp_path: Path, content: str
) -> None:
    folder = Path(shutil.copytree(made["unet"], tmp_path / "unet"))
    file = folder / "unet" / "config.json"
    if content.endswith("}"):
        edit(file, sample_size=None)
    else:
        file.write_text(content)
    assert "unet/config.json" in refusal(folder)


def test_the_shipped_priors_are_read_as_before() -> None:
    for name in ("digits", "faces"):
        config = diffusers_unet_prior(path=f"package://{name}/prior").scheduler_config
        assert config["timestep_spacing"] == "trailing" and config["variance_type"] == "fixed_large"
        assert config["prediction_type"] == "v_prediction" and config["clip_sample"] is False


def test_a_diffusion_scheduler_in_a_flow_pipeline_is_refused(
    made: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made["sd3"], tmp_path / "sd3"))
    (folder / SCHEDULER).write_text(json.dumps({"_class_name": "DDPMScheduler"}))
    edit(folder / "model_index.json", scheduler=["diffusers", "DDPMScheduler"])
    with pytest.raises(ConfigError, match="StableDiffusion3Pipeline, .* is a DDPMScheduler"):
        read(folder)
