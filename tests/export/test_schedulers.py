"""Exported schedulers take the steps of the run's kernel where diffusers' own take others."""

import json
import warnings

import pytest
import torch
from exports import as_images, drawn, export

from ctrl_rl import ControlledPipeline
from ctrl_rl.errors import ConfigError
from ctrl_rl.export.schedulers import FlowSDEScheduler, scheduler_of
from ctrl_rl.kernels.levels import noise_levels

pytest.importorskip("transformers")


def test_uneven_steps_and_a_changed_scheduler_are_exported(tmp_path):
    change = "prior.scheduler={timestep_spacing:linspace}"
    run, folder, _ = export(tmp_path, "sd", "ddim", "", change, "kernel.num_steps=4")
    assert run.env.process.kernel.timesteps.tolist() == [999, 749, 500, 250, 0]
    settings = json.loads((folder / "control.json").read_text())
    assert settings["scheduler_config"] == {"timestep_spacing": "linspace"}
    pipeline = ControlledPipeline.from_pretrained(folder)
    pipeline.pipeline.set_progress_bar_config(disable=True)
    images = drawn(pipeline, ["a cat"] * 2, control={"level": [0, 1]})
    asked = {"prompt": "a cat", "level": torch.tensor([0, 1])}
    expected = as_images(run.sample(asked, n=2, seed=3))
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["VisitedDDIMScheduler", "DDIMScheduler"])  # and earlier exports'
def test_the_noise_law_of_the_base_model_is_kept(name):
    # A Heun scheduler's own betas, which diffusers forgets in from_config.
    from diffusers import HeunDiscreteScheduler

    base = {"_class_name": "HeunDiscreteScheduler", **HeunDiscreteScheduler().config}
    scheduler = scheduler_of({"scheduler": name, "scheduler_settings": {}}, base)
    signal, _ = noise_levels(base)(torch.arange(1000))
    torch.testing.assert_close(scheduler.alphas_cumprod, signal.square())
    assert scheduler.config.clip_sample is False


def test_schedulers_that_priors_are_not_read_from_are_refused():
    settings = {"scheduler": "VisitedDDPMScheduler", "scheduler_settings": {}}
    with pytest.raises(ConfigError, match="scheduler EDMEulerScheduler is not read"):
        scheduler_of(settings, {"_class_name": "EDMEulerScheduler"})
    with pytest.raises(ConfigError, match="scheduler LCMScheduler is not read"):
        FlowSDEScheduler.from_config({"_class_name": "LCMScheduler"})
    with pytest.raises(ConfigError, match="scheduler DDPMScheduler has .*=flow_prediction"):
        FlowSDEScheduler.from_config({"_class_name": "DDPMScheduler"})


def test_a_saved_scheduler_is_loaded_without_a_warning(tmp_path):
    config = {"timestep_spacing": "trailing", "beta_schedule": "scaled_linear"}
    for name in ("VisitedDDIMScheduler", "VisitedDDPMScheduler"):
        scheduler = scheduler_of({"scheduler": name, "scheduler_settings": {}}, config)
        scheduler.save_pretrained(tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = type(scheduler).from_pretrained(tmp_path / name)
        again.set_timesteps(61)
        assert len(again.timesteps) == 61 and again.timesteps[-1] == 15
