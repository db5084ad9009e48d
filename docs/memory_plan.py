"""Memory and denoiser calls of one update on Stable Diffusion 1.5 at 512 x 512, by arithmetic.

    python docs/memory_plan.py docs/pipelines.md

fills what stands between `<!-- plan -->` and `<!-- /plan -->`. Nothing is allocated: the networks
are built without storage (torch's meta device) with the published sizes, and what autograd would
save is counted. Attention counts as the fused kernels of accelerators have it, which save their
inputs, their output and one number per row. Calls are counted on a small pipeline.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from memory import SavedBytes
from results import fill
from torch import Tensor
from torch.nn import functional

from ctrl_rl import keys
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import RolledChain, rollout
from ctrl_rl.kernels import ddim_kernel
from ctrl_rl.learning.learner import Learner
from ctrl_rl.learning.update import rehearse
from ctrl_rl.policies import LowRankPolicy
from ctrl_rl.priors import NetworkDenoiser, Prior, Prompts, diffusers_prior
from ctrl_rl.priors.diffusers.guided import LatentDecoder
from ctrl_rl.priors.diffusers.text_unet import TextUNet
from ctrl_rl.rewards import FunctionReward
from ctrl_rl.runs import build
from ctrl_rl.runs.compose import compose

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from pipelines import MAKERS  # noqa: E402

K, EPISODES = 50, 64
_FEW = 2  # episodes of the small pipeline, to count with
# Rombach et al. 2022 and the configs of stable-diffusion-v1-5: 860 and 84 million weights.
UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


class _Fused(torch.autograd.Function):
    """Attention that saves what the fused kernels save."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1]).float())
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    output: Tensor = _Fused.apply(query, key, value)
    return output


def saved_by(call: Callable[[], Tensor], left_out: list[Tensor]) -> float:
    """GB that a call leaves for its backward pass, the weights not counted."""
    count = SavedBytes(left_out)
    whole = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _attention  # type: ignore[assignment]
    try:
        with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda saved: saved.tensor):
            result = call()
        found = count.peak / 1e9
        del result
    finally:
        functional.scaled_dot_product_attention = whole
    return found


def sizes(dtype: torch.dtype) -> dict[str, float]:
    """What there is, in GB, and per sample."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
        texts = torch.empty(2, 77, 768, dtype=dtype)
    network = TextUNet(unet.to(dtype), texts, {}, guidance_scale=7.5)
    denoiser = NetworkDenoiser(network, SCHEDULER, embedding_features=network.embedding_features)
    decoder = LatentDecoder(vae.to(dtype))
    prior = Prior(
        denoiser,
        SCHEDULER,
        shape=(4, 64, 64),
        decoder=decoder,
        prompts=Prompts(("a",), ("a",)),
    ).to("meta")
    kernel = ddim_kernel(scheduler_config=SCHEDULER, num_steps=K).to("meta")
    weights = sum(p.numel() * p.element_size() for p in prior.parameters()) / 1e9
    policy = LowRankPolicy(prior=prior, kernel=kernel, controls={"size": 4}).to("meta")
    trained = sum(p.numel() for p in policy.parameters()) / 1e9
    x = torch.empty(1, 4, 64, 64, device="meta", requires_grad=True)
    at = torch.zeros(1, dtype=torch.int64, device="meta")
    control = {"size": at, "prompt": at}
    fixed = [*prior.parameters(), *prior.buffers(), *policy.parameters(), *policy.buffers()]
    step = saved_by(lambda: policy.loc(x, at, control, x), fixed)
    return {
        "weights": weights,
        "adapters": trained * 4 * 4,  # float32: the weight, its gradient, two moments
        "step": step,
        "decode": saved_by(lambda: decoder(x), fixed),
        "latent": x.numel() * 4 / 1e9,
    }


def learner_on(
    agent: str, folder: Path, *, episodes: int, dtype: str = "float32", device: str = "cpu"
) -> tuple[LatentEnv, Learner]:
    """Env and learner of an agent with adapters on a pipeline's folder."""
    prior = diffusers_prior(path=str(folder), prompts=["a"], dtype=dtype)
    process = DenoisingProcess(
        prior=prior,
        kernel=ddim_kernel(scheduler_config=prior.scheduler_config, num_steps=K),
        reward=FunctionReward(function=_level, controls={"level": 2}, differentiable=True),
    ).to(device)
    config = compose("train", [f"agent={agent}"])
    if "checkpointing" in config.agent:
        config.agent.checkpointing = True
    built = build.build_agent(config, process)
    policy = LowRankPolicy(prior=prior, kernel=process.kernel, controls=process.controls)
    learner = Learner(policy.to(device), built, build.build_trainer_config(config))
    return LatentEnv(process, num_envs=episodes, device=device), learner


def calls(agent: str, folder: Path) -> tuple[float, float]:
    """Evaluations of prior and policy per episode of an update; latents kept per step of it."""
    env, learner = learner_on(agent, folder, episodes=_FEW)
    agent, shape = learner.agent, env.process.shape
    chain = RolledChain(env, learner.policy)
    episode = agent.prepare(rollout(env, learner.policy, plan=agent.plan), chain)
    stored = episode.exclude(keys.CLEAN, keys.SAMPLE)  # which are views
    latents = [value for value in stored.values(True, True) if value.shape[2:] == shape]
    (number,) = rehearse(env, learner).values()
    return number / _FEW, float(len(latents))


def _level(sample: Tensor, control: Mapping[str, Tensor]) -> Tensor:
    return sample.mean(dim=(1, 2, 3)) * (control["level"] < 1)


def main(document: Path) -> None:
    """Fill the table."""
    torch.set_num_threads(1)
    agents = {"`ctrl`, checkpointing": "ctrl", "`adjoint`": "adjoint", "`ppo`": "ppo"}
    found = {name: sizes(getattr(torch, name)) for name in ("float16", "float32")}
    with tempfile.TemporaryDirectory() as folder:
        pipeline = MAKERS["sd"](Path(folder) / "sd")
        counted = {title: calls(agent, pipeline) for title, agent in agents.items()}
    half = found["float16"]
    lines = [
        f"Weights {half['weights']:.1f} GB in float16 and {found['float32']['weights']:.1f} GB in "
        f"float32, adapters with gradients and moments {half['adapters'] * 1000:.0f} MB. A guided "
        f"call of one sample leaves {half['step']:.1f} GB (float32: "
        f"{found['float32']['step']:.1f} GB) for its backward pass, the decoder of one image "
        f"{half['decode']:.1f} GB; a latent is {half['latent'] * 1e6:.0f} kB.",
        "",
        f"| {K} steps, {EPISODES} episodes per update | calls per episode | latents kept, GB | "
        "GB at `trainer.microbatch=1` | 4 | 16 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for title, (number, latents) in counted.items():
        for dtype, size in found.items():
            kept = latents * K * EPISODES * size["latent"]
            decode = 0.0 if title == "`ppo`" else size["decode"]
            totals = [
                size["weights"] + size["adapters"] + kept + max(rows * size["step"], decode)
                for rows in (1, 4, 16)
            ]
            cells = [f"{title}, {dtype}", f"{number:,.0f}", f"{kept:.1f}"]
            lines.append("| " + " | ".join([*cells, *(f"{t:.0f}" for t in totals)]) + " |")
    fill(document, "plan", "\n".join(lines))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
