"""Priors with prompts against the stock pipelines that they were read from."""

import pytest
import torch
from pipelines import FLOWS, MAKERS, SIZES, noise_like
from torch.optim.swa_utils import AveragedModel

from ctrl_rl import keys
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.errors import ConfigError
from ctrl_rl.export.schedulers import FlowSDEScheduler
from ctrl_rl.kernels import ddim_kernel, euler_ancestral_kernel, flow_sde_kernel
from ctrl_rl.policies import LowRankPolicy, PriorPolicy
from ctrl_rl.priors import diffusers_prior
from ctrl_rl.rewards import FunctionReward

pytest.importorskip("transformers")
PROMPTS = ["a cat", "ein Hund 🐕", ""]
K = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {kind: make(folder / kind) for kind, make in MAKERS.items()}


@pytest.fixture
def folder(folders):
    return folders["sd"]


def brightness(sample, control):
    sign = 1 - 2 * control["level"].float()
    value = torch.nn.functional.logsigmoid(8 * sign * sample.mean(dim=(1, 2, 3)))
    return torch.where(control["level"] < 2, value, 0.0)


def process_of(folder, kernel=None, **settings):
    settings = {"prompts": PROMPTS, "size": SIZES.get(folder.name), **settings}
    prior = diffusers_prior(path=str(folder), **settings)
    kernel = kernel or (flow_sde_kernel if folder.name in FLOWS else ddim_kernel)
    return DenoisingProcess(
        prior=prior,
        kernel=kernel(scheduler_config=prior.scheduler_config, num_steps=K),
        reward=FunctionReward(function=brightness, controls={"level": 2}, differentiable=True),
    )


def stock(folder, prompts, *, steps, seed, scheduler, **given):
    """Images of the stock pipeline, with a scheduler of the same kind as the kernel."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    config = pipeline.scheduler.config
    pipeline.scheduler = scheduler.from_config({"clip_sample": False, **config})
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    if scheduler is FlowSDEScheduler:
        pipeline.scheduler.draw = lambda latents: noise_like(latents, generator)
    return pipeline(
        prompts, num_inference_steps=steps, output_type="pt", generator=generator, **given
    ).images


# Settings of the prior, and what the stock pipeline's call is told for them.
GUIDANCE = {
    "default": ({}, {}),
    "none": ({"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
    "negative": (
        {"negative_prompt": "grey", "guidance_scale": 3.0},
        {"negative_prompt": ["grey"] * len(PROMPTS), "guidance_scale": 3.0},
    ),
    "large": ({"size": [24, 16]}, {"height": 24, "width": 16}),
}
CASES = [(kind, name, None) for kind in ("sd", "sdxl", "sd3") for name in GUIDANCE]
CASES += [("flux", "default", None), ("flux", "negative", None), ("flux-dev", "default", None)]
CASES += [("sd", "default", euler_ancestral_kernel), ("sdxl", "negative", euler_ancestral_kernel)]


@pytest.mark.parametrize(("kind", "guidance", "kernel"), CASES)
@torch.no_grad()
def test_samples_are_the_stock_pipelines(kind, guidance, kernel, folders):
    from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler

    folder = folders[kind]
    settings, given = GUIDANCE[guidance]
    process = process_of(folder, kernel, **settings)
    height, width = settings.get("size", [16, 16])
    assert process.sample_shape == (3, height, width)
    env = LatentEnv(process, num_envs=len(PROMPTS), seed=7)
    place = torch.arange(len(PROMPTS))
    episode = rollout(env, PriorPolicy(process.kernel), control={keys.PROMPT: place})
    images = (episode[keys.SAMPLE][:, -1] / 2 + 0.5).clamp(0, 1)
    scheduler = EulerAncestralDiscreteScheduler if kernel else DDIMScheduler
    if kind in FLOWS:
        scheduler = FlowSDEScheduler
    given = {"height": height, "width": width, **given}
    if scheduler is DDIMScheduler:
        given["eta"] = 1.0
    if kind == "flux" and "guidance_scale" in given:
        given["true_cfg_scale"] = given.pop("guidance_scale")
    steps = len(process.kernel.timesteps)  # a read-out included, where the scheduler has one
    expected = stock(folder, PROMPTS, steps=steps, seed=7, scheduler=scheduler, **given)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(images[0], images[1], atol=1e-2)  # the samples differ


@pytest.mark.parametrize("kind", MAKERS)
def test_policy_is_the_prior_at_the_start_and_learns_beside_it(kind, folders):
    process = process_of(folders[kind])
    policy = LowRankPolicy(prior=process.prior, kernel=process.kernel, controls=process.controls)
    env = LatentEnv(process, num_envs=4, seed=0)
    before = rollout(env, PriorPolicy(process.kernel))[keys.SAMPLE]
    plan = RolloutPlan(gradients="pathwise")
    episode = rollout(env, policy, plan=plan)
    assert (episode[keys.LOG_RATIO] == 0).all() and (episode[keys.KL] == 0).all()
    (-episode[keys.NEXT_REWARD].sum()).backward()
    groups = policy.parameter_groups()
    assert all(any(p.grad.abs().sum() > 0 for p in group) for group in groups.values())
    parameters = [p for group in groups.values() for p in group]
    torch.optim.SGD(parameters, lr=1.0).step()
    with torch.no_grad():
        assert (rollout(env, policy)[keys.KL].sum(1) > 0).all()
        env.set_seed(0)
        again = rollout(env, PriorPolicy(process.kernel))[keys.SAMPLE]
    assert torch.equal(again, before)  # the reference is the network with its adapters off


def test_recomputed_activations_give_the_same_gradients(folder, monkeypatch):
    counted = []

    def counting(*given, **named):
        counted.append(given[0])
        return torch.utils.checkpoint.checkpoint(*given, **named)

    monkeypatch.setattr("ctrl_rl.networks.execution.checkpoint", counting)
    process = process_of(folder)
    policy = LowRankPolicy(prior=process.prior, kernel=process.kernel, controls=process.controls)
    parameters = [p for group in policy.parameter_groups().values() for p in group]
    torch.nn.init.normal_(parameters[1], std=0.1)
    env = LatentEnv(process, num_envs=2)
    found = []
    for checkpointing in (False, True):
        env.set_seed(3)
        plan = RolloutPlan(gradients="pathwise", checkpointing=checkpointing)
        episode = rollout(env, policy, plan=plan)
        loss = episode[keys.KL].sum() - episode[keys.NEXT_REWARD].sum()
        found.append(torch.autograd.grad(loss, parameters))
    assert len(counted) == 2 * K + 2  # prior and policy at every step, and every image
    for kept, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["sd", "sd3", "flux-dev"])
def test_half_precision_starts_at_the_prior_and_trains_in_float32(kind, dtype, folders):
    process = process_of(folders[kind], dtype=dtype)
    policy = LowRankPolicy(prior=process.prior, kernel=process.kernel, controls=process.controls)
    env = LatentEnv(process, num_envs=2)
    episode = rollout(env, policy, plan=RolloutPlan(gradients="pathwise"))
    assert episode[keys.LOC].dtype == torch.float32
    assert (episode[keys.LOG_RATIO] == 0).all() and torch.isfinite(episode[keys.SAMPLE]).all()
    parameters = [p for group in policy.parameter_groups().values() for p in group]
    assert {p.dtype for p in parameters} == {torch.float32}
    (-episode[keys.NEXT_REWARD].sum()).backward()
    torch.optim.AdamW(parameters, lr=1e-4).step()
    assert all(torch.isfinite(p).all() for p in parameters)
    with torch.no_grad():
        assert (rollout(env, policy)[keys.KL].sum(1) > 0).all()


def test_a_moving_average_copies_adapters_and_no_network(folder):
    process = process_of(folder)
    policy = LowRankPolicy(prior=process.prior, kernel=process.kernel, controls=process.controls)
    before = sum(p.numel() for p in process.parameters())
    average = AveragedModel(policy)
    own = sum(p.numel() for p in policy.denoiser.parameters())
    assert sum(p.numel() for p in process.parameters()) == before + own
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
        env = LatentEnv(process, num_envs=2)
        assert (rollout(env, average.module)[keys.KL] == 0).all()
    average.update_parameters(policy)  # the first update copies
    results = []
    for each in (policy, average.module):
        env.set_seed(0)
        with torch.no_grad():
            results.append(rollout(env, each)[keys.LOC])
    assert torch.equal(*results)


def test_two_policies_on_one_prior_do_not_mix(folder):
    process = process_of(folder)
    given = {"prior": process.prior, "kernel": process.kernel, "controls": process.controls}
    others = [LowRankPolicy(**given, targets=[target]) for target in ("to_q", "to_k")]
    first, second = (LowRankPolicy(**given) for _ in range(2))
    names = {policy.denoiser.name for policy in (*others, first, second)}
    assert len(names) == 4
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(torch.randn_like(parameter))
        env = LatentEnv(process, num_envs=2)
        assert all((rollout(env, each)[keys.KL] == 0).all() for each in (second, *others))
        assert (rollout(env, first)[keys.KL] > 0).any()
    assert all(p.requires_grad for policy in (first, second) for p in policy.parameters())
    second.load_state_dict(first.state_dict())
    results = []
    for policy in (first, second):
        env.set_seed(0)
        with torch.no_grad():
            results.append(rollout(env, policy)[keys.LOC])
    assert torch.equal(*results)


def test_conditions_are_evaluation_prompts_with_labels(folder):
    process = process_of(folder, prompts=["cat", "dog"], evaluation_prompts=["fox", "dog"])
    sizes = {name: control.size for name, control in process.conditions.controls.items()}
    assert sizes == {"prompt": 3, "level": 2}
    names = [process.conditions.name(condition) for condition in process.conditions]
    assert names == [f"prompt={p}, level={i}" for p in ("fox", "dog") for i in (0, 1)]
    drawn = process.draw_control(64, torch.Generator().manual_seed(0))
    assert torch.bincount(drawn["prompt"]).tolist() == [32, 32]  # those of training alone


def test_long_prompts_are_cut_with_a_sentence(folder):
    with pytest.warns(UserWarning, match="tokens, and the text encoder reads the first 77"):
        long = process_of(folder, prompts=["word " * 500])
    with pytest.warns(UserWarning, match="has 220 tokens"):
        seen = process_of(folder, prompts=["word " * 50 + "behind the last token"])
    samples = [
        rollout(LatentEnv(process, num_envs=1), PriorPolicy(process.kernel))[keys.SAMPLE]
        for process in (long, seen)
    ]
    assert torch.equal(*samples)


def test_latents_are_not_clipped_where_the_scheduler_does_not_say_so(folder):
    assert process_of(folder).kernel.clip is None


def test_prompts_are_cut_where_t5_stops(folders):
    with pytest.warns(UserWarning, match="reads the first 256"):
        process_of(folders["sd3"], prompts=["word " * 500])
    with pytest.warns(UserWarning, match="reads the first 512"):
        process_of(folders["flux"], prompts=["word " * 500])


def test_a_negative_prompt_that_does_nothing_is_refused(folders):
    with pytest.raises(ConfigError, match="does nothing without guidance"):
        process_of(folders["flux"], negative_prompt="grey")


def test_a_distilled_model_takes_no_negative_prompt(folders):
    with pytest.raises(ConfigError, match="guidance-distilled and takes none"):
        process_of(folders["flux-dev"], negative_prompt="grey")


def test_images_without_positions_are_refused(folders):
    with pytest.raises(ConfigError, match="at most 32 pixels a side"):
        process_of(folders["sd3"], size=[16, 40])


def test_guidance_is_the_pipelines_own_where_none_is_given(folders):
    own = {"sd": 7.5, "sdxl": 5.0, "sd3": 7.0, "flux": 1.0, "flux-dev": 1.0}
    for kind, scale in own.items():
        network = process_of(folders[kind]).prior.denoiser.network
        assert network.guidance_scale == scale
    assert network.embedded_guidance == 3.5


REFUSED = {
    "prior.prompts=cat must be a list": {"prompts": "cat"},
    "which draws prompts; give prior.prompts": {"prompts": None},
    "prior.prompts has 'cat' twice": {"prompts": ["cat", "cat"]},
    "prior.evaluation_prompts is empty": {"evaluation_prompts": []},
    "prior.guidance_scale=0.5 must be 1": {"guidance_scale": 0.5},
    "did you mean 'float16'": {"dtype": "float61"},
    "multiples of 2 pixels with this model": {"size": [16, 17]},
    "must be .height, width., in pixels": {"size": [16]},
    "does nothing without guidance": {"negative_prompt": "grey", "guidance_scale": 1.0},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_settings_are_refused(folder, reason):
    with pytest.raises(ConfigError, match=reason):
        process_of(folder, **REFUSED[reason])


def test_without_the_hub_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as raised:
        diffusers_prior(path="someone/model", prompts=["cat"])
    told = str(raised.value)
    assert (
        "prior.path=someone/model is neither a pipeline's folder with model_index.json here" in told
    )
    assert "model_index.json" in told and "https://huggingface.co/someone/model" in told
    assert "\n" not in told


@pytest.mark.parametrize(
    "setting",
    [{"prompts": ["cat"]}, {"guidance_scale": 3.0}, {"dtype": "bfloat16"}, {"size": [8, 8]}],
    ids=lambda setting: next(iter(setting)),
)
def test_text_settings_of_an_unconditional_pipeline_are_refused(setting, tiny_pipeline):
    with pytest.raises(ConfigError, match=f"prior.{next(iter(setting))}=.* has no prompts"):
        diffusers_prior(path=str(tiny_pipeline), **setting)
