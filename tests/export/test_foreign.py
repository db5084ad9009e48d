"""Exported folders come from strangers, and are written whole beside what is others'."""

import json
import os
import shutil

import pytest
import torch
from exports import export
from safetensors.torch import load_file, save_file

from ctrl_rl import ControlledPipeline
from ctrl_rl.cli.main import main
from ctrl_rl.errors import ConfigError
from ctrl_rl.export.lora import _SCHEDULERS
from ctrl_rl.export.pipeline import ADAPTERS, EMBEDDING, FILES
from ctrl_rl.export.schedulers import SCHEDULERS, scheduler_of
from ctrl_rl.export.settings import DTYPES, PARTS, read_settings
from ctrl_rl.priors import pipelines

pytest.importorskip("transformers")

GOOD = {
    "base_model": "somebody/model",
    "pipeline": "StableDiffusionPipeline",
    "dtype": "float32",
    "part": "unet",
    "scheduler": "FlowSDEScheduler",
    "scheduler_settings": {"noise_level": 0.7},
    "controls": {"size": ["small", "large"], "mean": {"low": -1, "high": 1}},
    "read_out": False,
    "call": {"num_inference_steps": 3, "guidance_scale": 2.0},
}
REFUSED = {
    "pipeline": {
        "StableDiffusionPipelin": "did you mean 'StableDiffusionPipeline'",
        "DiffusionPipeline": "unknown pipeline 'DiffusionPipeline'",
        "OnnxRuntimeModel": "unknown pipeline",
        "utils": "unknown pipeline 'utils'",
        3: "pipeline=3 must be a str",
    },
    "dtype": {"save": "unknown dtype 'save'", "int8": "accepted: bfloat16, float16, float32"},
    "part": {"vae": "unknown part 'vae'; accepted: unet", "transformer": "accepted: unet"},
    "scheduler": {"UNet2DModel": "unknown scheduler", "PNDMScheduler": "unknown scheduler"},
    "base_model": {None: "base_model=null must be a str", 3: "base_model=3"},
    "scheduler_settings": {
        "[]": "must be a dict",
        '{"trained_betas": [1]}': "unknown setting of the scheduler 'trained_betas'",
        '{"noise_level": "x"}': 'noise_level="x" must be a number',
    },
    "controls": {"3": "must be a dict", '{"size": 0}': "size=0 is no control"},
    "read_out": {"1": "read_out=1 must be a bool"},
    "call": {
        '{"pipe": 1}': "unknown argument of the call 'pipe'",
        '{"self": 1}': "unknown argument of the call 'self'",
        "[]": "call=\\[\\] must be a dict",
    },
    "label_names": {"3": "label_names must be a dict"},
}
CASES = [(name, value) for name, values in REFUSED.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES)
def test_settings_that_no_export_has_are_refused_by_the_files_name(name, value, tmp_path):
    as_json = name in ("scheduler_settings", "controls", "read_out", "call", "label_names")
    given = json.loads(value) if as_json else value
    file = tmp_path / "control.json"
    file.write_text(json.dumps(GOOD))
    assert read_settings(tmp_path) == GOOD
    file.write_text(json.dumps(GOOD | {name: given}))
    with pytest.raises(ConfigError, match=REFUSED[name][value]) as told:
        ControlledPipeline.from_pretrained(tmp_path)
    assert str(told.value).startswith(f"{file} is not what `ctrl-rl export` writes: ")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b"{}"])
def test_damaged_settings_are_one_line(content, tmp_path):
    (tmp_path / "control.json").write_bytes(content)
    with pytest.raises(ConfigError, match="is not what `ctrl-rl export` writes: ") as told:
        ControlledPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(told.value)


def test_every_setting_must_be_there(tmp_path):
    for name in GOOD:
        rest = {key: value for key, value in GOOD.items() if key != name}
        (tmp_path / "control.json").write_text(json.dumps(rest))
        with pytest.raises(ConfigError, match=f"{name}=null must be a"):
            read_settings(tmp_path)


def test_accepted_names_are_those_of_exports():
    assert set(SCHEDULERS) == set(_SCHEDULERS.values())
    assert set(PARTS) == set(pipelines._TEXT) and set(DTYPES) == set(pipelines._DTYPES)
    with pytest.raises(ConfigError, match="unknown scheduler 'utils'"):
        scheduler_of({"scheduler": "utils", "scheduler_settings": {}}, {})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    run, out, base = export(tmp_path_factory.mktemp("export"), "sd", "ddim", "")
    return run, out, base


def test_the_base_model_is_read_from_safetensors_without_code(exported, tmp_path, monkeypatch):
    _, out, base = exported
    pickled = shutil.copytree(base, tmp_path / "pickled")
    weights = pickled / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), pickled / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ConfigError, match="base=.*pickled is neither a StableDiffusionPipeline"):
        ControlledPipeline.from_pretrained(out, base=str(pickled))
    own = shutil.copytree(base, tmp_path / "own")
    index = json.loads((own / "model_index.json").read_text())
    index["_class_name"] = ["mine", "Mine"]
    (own / "model_index.json").write_text(json.dumps(index))
    (own / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: ...\n")
    with pytest.raises(ConfigError, match="base=.*own is neither"):
        ControlledPipeline.from_pretrained(out, base=str(own))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [ADAPTERS, EMBEDDING])
def test_damaged_weights_are_one_line(name, exported, tmp_path):
    folder = shutil.copytree(exported[1], tmp_path / "out")
    shapes = {key: torch.zeros(3) for key in load_file(folder / name)}
    for damage in (
        lambda: os.truncate(folder / name, 30),
        lambda: save_file({"other": torch.zeros(2)}, folder / name),
        lambda: save_file(shapes, folder / name),
        lambda: (folder / name).unlink(),
    ):
        damage()
        with pytest.raises(ConfigError, match=f"{name} is damaged or not of this base") as told:
            ControlledPipeline.from_pretrained(folder)
        assert "\n" not in str(told.value)


def test_an_export_is_readable_by_others_and_replaces_only_exports(exported, tmp_path, capsys):
    run, out, _ = exported
    mask = os.umask(0)
    os.umask(mask)
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o666 & ~mask}
    assert {file.name for file in out.iterdir()} == set(FILES)
    again = ControlledPipeline.from_pretrained(out)
    again.save_pretrained(tmp_path / "again")
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "again").iterdir()}
    assert modes == {0o666 & ~mask}
    folder = shutil.copytree(out, tmp_path / "out")
    words = ["export", f"run={run.run.path}", f"out={folder}"]
    os.truncate(folder / ADAPTERS, 3)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    for name in ("thesis.tex", "control.json"):  # a foreign file, then a foreign control.json
        (folder / name).write_text("{}")
        capsys.readouterr()
        assert main(words) == 2
        assert "will not write a pipeline with controls" in capsys.readouterr().err
        assert (folder / name).read_text() == "{}"
        (folder / "thesis.tex").unlink(missing_ok=True)
    shutil.copyfile(out / "control.json", folder / "control.json")
    assert main([*words, "trust=my_redness"]) == 0
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"again", "out"}
