"""What is exported draws the run's own images: in a stock pipeline, and with the control."""

import json
import shutil

import pytest
import torch
from exports import as_images, drawn, export

from ctrl_rl import ControlledPipeline
from ctrl_rl.cli.main import main
from ctrl_rl.errors import ConfigError
from ctrl_rl.export.schedulers import FlowSDEScheduler, scheduler_of
from ctrl_rl.priors.diffusers.text_transformer import packed

pytest.importorskip("transformers")

CASES = [
    *(("sd", "ddim", ""), ("sdxl", "ddim", "grey"), ("sd", "ddpm", "")),
    *(("sd", "euler_ancestral", ""), ("sd3", "flow_sde", "grey")),
    *(("flux", "flow_sde", "grey"), ("flux-dev", "flow_sde", "")),
]


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case[:2]) for case in CASES])
def exported(request, tmp_path_factory):
    """A trained run and the folder that it was exported to."""
    kind, kernel, negative = request.param
    run, out, base = export(tmp_path_factory.mktemp("export"), kind, kernel, negative)
    return run, out, base, negative


def test_lora_in_a_stock_pipeline_is_the_policy_without_a_control(exported):
    import diffusers

    run, folder, base, negative = exported
    process = run.env.process
    settings = json.loads((folder / "control.json").read_text())
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler_of(settings, pipeline.scheduler.config)
    latents = []

    def keep(pipeline, step, timestep, tensors):
        latents.append(tensors["latents"])
        return tensors

    call = settings["call"] | as_list(negative) | {"callback_on_step_end": keep}
    untrained = drawn(pipeline, ["a dog"] * 2, **call)
    pipeline.load_lora_weights(folder)
    latents.clear()
    images = drawn(pipeline, ["a dog"] * 2, **call)
    actions = run.strip({"prompt": "a dog"}, n=2, seed=3).latents[:, 1:].unbind(1)
    kept = latents[-len(process.kernel.timesteps) :]
    for k, (found, action) in enumerate(zip(kept, actions, strict=False)):
        tolerance = 1e-5
        if "Euler" in settings["scheduler"]:  # whose latents are larger, and so is their rounding
            found = found / (1 + pipeline.scheduler.sigmas[k + 1] ** 2).sqrt()
            tolerance = 2e-5
        expected = packed(action) if found.ndim == 3 else action
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert not torch.allclose(images, untrained, atol=1e-3)
    # A last step without noise is no action: it is the base model's, and the stock pipeline's LoRA
    # adapts it too.
    expected = as_images(run.sample({"prompt": "a dog"}, n=2, seed=3))
    same = torch.allclose(images, expected, rtol=0, atol=1e-5)
    assert same != process.kernel.has_read_out


def as_list(negative):
    return {"negative_prompt": [negative] * 2 if negative else None}


@pytest.mark.parametrize("strength", [1.0, 0.0, 1.5])
def test_controlled_pipeline_draws_the_runs_samples(exported, strength, tmp_path):
    run, folder, _, _ = exported
    pipeline = ControlledPipeline.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path / "again")
    for each in (pipeline, ControlledPipeline.from_pretrained(tmp_path / "again")):
        each.pipeline.set_progress_bar_config(disable=True)
        images = drawn(each, ["a cat"] * 2, control={"level": [0, 1]}, strength=strength)
        asked = {"prompt": "a cat", "level": torch.tensor([0, 1])}
        expected = as_images(run.sample(asked, n=2, seed=3, strength=strength))
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    twice = drawn(pipeline, "a cat", {"level": 1}, strength, num_images_per_prompt=2)
    expected = as_images(run.sample({"prompt": "a cat", "level": 1}, 2, 3, strength))
    torch.testing.assert_close(twice, expected, rtol=0, atol=1e-5)


def test_calls_that_the_stock_pipeline_takes(exported):
    """Sizes that it rounds, a guidance that does nothing without a negative prompt."""
    run, folder, _, negative = exported
    pipeline = ControlledPipeline.from_pretrained(folder)
    pipeline.pipeline.set_progress_bar_config(disable=True)
    packs = pipeline.settings["pipeline"] == "FluxPipeline"
    size = {"height": 18, "width": 22} if packs else {"height": 16, "width": 24}
    found = drawn(pipeline, "a cat", {"level": 1}, **size)
    assert found.shape[-2:] == (16, 20 if packs else 24)
    assert getattr(pipeline.pipeline.scheduler, "draw", None) is None
    network = getattr(pipeline.pipeline, pipeline.settings["part"])
    assert "forward" not in vars(network)
    scales = [{"true_cfg_scale": scale} if packs else {} for scale in (1.0, 4.0)]
    plain, scaled = (
        drawn(pipeline, "a cat", {"level": 1}, **{**scale, "negative_prompt": None})
        for scale in scales
    )
    assert torch.equal(plain, scaled)


def test_encoded_prompts_draw_what_texts_do(exported):
    _, folder, _, negative = exported
    pipeline = ControlledPipeline.from_pretrained(folder)
    stock = pipeline.pipeline
    stock.set_progress_bar_config(disable=True)
    texts = ["a cat", "a dog"]
    packs = pipeline.settings["pipeline"] == "FluxPipeline"
    if packs:
        embeds, pooled, _ = stock.encode_prompt(texts, None)
        given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    else:
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds")
        names += ("negative_pooled_prompt_embeds",)
        asked = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        if negative:
            asked["negative_prompt"] = [negative] * 2
        sd3 = {"prompt_2": None, "prompt_3": None}
        more = sd3 if pipeline.settings["pipeline"] == "StableDiffusion3Pipeline" else {}
        found = stock.encode_prompt(texts, **asked, **more)
        given = dict(zip(names, found, strict=False))
    control = {"level": [1, 0]}
    expected = drawn(pipeline, texts, control, 0.7)
    found = drawn(pipeline, None, control, 0.7, **given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=["sd", "sd3"])
def test_export_without_a_control(case, made, tmp_path):
    kind, kernel, _ = case
    score = ["reward=clip_score", f"reward.score.path={made('clip')}"]
    run, folder, _ = export(tmp_path, kind, kernel, "", *score)
    assert run.env.process.controls == {}
    card = (folder / "README.md").read_text()
    assert ", without a control" in card and "control=" not in card
    pipeline = ControlledPipeline.from_pretrained(folder)
    pipeline.pipeline.set_progress_bar_config(disable=True)
    images = drawn(pipeline, ["a cat", "a cat"])
    expected = as_images(run.sample({"prompt": "a cat"}, n=2, seed=3))
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_names_of_labels_are_exported_and_older_folders_have_none(exported, tmp_path):
    _, folder, _, _ = exported
    settings = json.loads((folder / "control.json").read_text())
    assert settings["controls"] == {"level": ["0", "1"]}
    images = []
    older = {"controls": {"level": 2}}
    named = {"label_names": {"level": ["dark", "bright"]}}
    for place, content in enumerate(
        (
            settings | {"controls": {"level": ["dark", "bright"]}},
            settings | older | named,
            settings | older,
        )
    ):
        changed = tmp_path / str(place)
        shutil.copytree(folder, changed)
        (changed / "control.json").write_text(json.dumps(content))
        pipeline = ControlledPipeline.from_pretrained(changed)
        pipeline.pipeline.set_progress_bar_config(disable=True)
        control = {"level": ["any", "bright"] if place < 2 else [2, 1]}
        images.append(drawn(pipeline, ["a cat"] * 2, control))
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_an_interrupted_call_leaves_the_adapters_on(exported, monkeypatch):
    run, folder, _, _ = exported
    pipeline = ControlledPipeline.from_pretrained(folder)
    pipeline.pipeline.set_progress_bar_config(disable=True)
    before = drawn(pipeline, "a cat", {"level": 1})
    network = getattr(pipeline.pipeline, pipeline.settings["part"])
    stock = network.forward

    def interrupted(*given, **named):
        raise KeyboardInterrupt

    network.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        pipeline("a cat", {"level": 1}, strength=0.5)
    network.forward = stock
    assert torch.equal(drawn(pipeline, "a cat", {"level": 1}), before)


def test_controls_are_checked(exported):
    pipeline = ControlledPipeline.from_pretrained(exported[1])
    for control, reason in {
        "size": "unknown control 'size'; accepted: level",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            pipeline("a cat", control={control: 1})
    with pytest.raises(ConfigError, match="use whole labels 0 to 1, or 2 for the null label"):
        pipeline("a cat", control={"level": 3})
    with pytest.raises(ConfigError, match="give one label, or 1 labels"):
        pipeline("a cat", control={"level": [0, 1]})
    with pytest.raises(ConfigError, match="unknown label 'hi' of control level; .*0, 1, any"):
        pipeline("a cat", control={"level": "hi"})
    with pytest.raises(ConfigError, match="must be >= 0"):
        pipeline("a cat", strength=-1.0)
    with pytest.raises(ConfigError, match="give a prompt, or prompt_embeds"):
        pipeline(control={"level": 1})


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ancestral_scheduler_starts_at_unit_variance(spacing):
    config = {"timestep_spacing": spacing, "beta_schedule": "scaled_linear", "skip_prk_steps": True}
    settings = {"scheduler": "UnitStartEulerAncestralScheduler", "scheduler_settings": {}}
    scheduler = scheduler_of(settings, config)
    scheduler.set_timesteps(7)
    start = scheduler.scale_model_input(scheduler.init_noise_sigma, scheduler.timesteps[0])
    assert float(start) == pytest.approx(1.0, abs=1e-6)


def test_flow_scheduler_keeps_its_noise_level(tmp_path):
    scheduler = FlowSDEScheduler.from_config({"shift": 3.0}, noise_level=0.3)
    scheduler.save_pretrained(tmp_path)
    again = FlowSDEScheduler.from_pretrained(tmp_path)
    assert again.config.noise_level == 0.3 and again.config.shift == 3.0
    assert FlowSDEScheduler.from_config(again.config).config.noise_level == 0.3
    assert FlowSDEScheduler.from_config({"shift": 3.0}).config.noise_level == 0.7


def test_card_and_files(exported):
    run, folder, base, _ = exported
    names = {file.name for file in folder.iterdir()}
    expected = {"control.json", "control_embedding.safetensors", "README.md"}
    assert names == expected | {"pytorch_lora_weights.safetensors"}
    card = (folder / "README.md").read_text()
    assert f"base_model: {base}" in card and "level (0 to 1)" in card
    assert f"| gap_nats | {run.summary['gap_nats']:.4g} |" in card
    assert json.loads((folder / "control.json").read_text())["base_model"] == str(base)


def test_what_cannot_be_exported_is_refused(tmp_path, capsys):
    words = ["train", "env=gaussian", "trainer.updates=1", f"run.root={tmp_path}", "run.name=run"]
    assert main([*words, "evaluation.prior_samples=8", "evaluation.policy_samples=3"]) == 0
    capsys.readouterr()
    assert main(["export", f"run={tmp_path / 'run'}", f"out={tmp_path / 'out'}"]) == 2
    assert "what can be exported is policy=low_rank" in capsys.readouterr().err
    assert main(["export", f"run={tmp_path / 'run'}"]) == 2
    assert "where to?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no control.json"):
        ControlledPipeline.from_pretrained(tmp_path)
