"""Seconds and peak memory of updates on a full-size Stable Diffusion 1.5 with random weights.

    python docs/full_size.py [cuda] [float16] [episodes] [microbatch]

builds the pipeline in `runs/full_size` (about 4 GB) and times a rollout of 64 episodes, or of as
many as you say, of 50 steps at 512 x 512 with guidance. Then it times an update of `ctrl`,
`adjoint` and `ppo`, its rollout included. It prints images per second of the rollout, and seconds
and peak memory of the updates; `docs/memory_plan.py` has what is to be expected. A single episode
goes first, so that nothing is loaded or tuned while the clock runs.
Without a device it is a rehearsal: the small pipeline of the tests, 4 episodes, on the CPU.
"""

import sys
import time
from functools import partial
from pathlib import Path

import torch
from memory_plan import SCHEDULER, UNET, VAE, learner_on

from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.learning.learner import Learner
from ctrl_rl.learning.replay import Replay
from ctrl_rl.learning.update import update

FOLDER = Path(__file__).parents[1] / "runs" / "full_size"
_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}


def pipeline(full: bool) -> Path:
    """The folder of a random pipeline, made where it is not there yet."""
    import pipelines
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as UNet
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = FOLDER / ("full" if full else "small")
    if (folder / "model_index.json").is_file():
        return folder
    if not full:
        return pipelines.stable_diffusion(folder)
    tokenizer = pipelines.byte_tokenizer(folder.parent / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **_TEXT,
    )
    StableDiffusionPipeline(
        unet=UNet(**UNET),
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=PNDMScheduler.from_config(SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def now(device: str) -> float:
    """Seconds, once the device has done all that it was told."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.monotonic()


def update_once(env: LatentEnv, learner: Learner) -> None:
    """One update of an agent with one phase."""
    replay = Replay(learner.agent.plan, env.generator)
    update(env, learner, learner.agent, replay, step=partial(learner.step, 0))


def images_per_second(folder: Path, device: str, dtype: str, episodes: int, rows: int) -> float:
    """Of a rollout without gradients, the log-ratios included."""
    seconds = 0.0
    for count in (1, episodes):
        env, learner = learner_on("ppo", folder, episodes=count, dtype=dtype, device=device)
        env.process.execution.microbatch = rows
        start = now(device)
        with torch.no_grad():
            rollout(env, learner.policy)
        seconds = now(device) - start
    return episodes / seconds


def row(agent: str, folder: Path, device: str, dtype: str, episodes: int, rows: int) -> str:
    """A row of the table."""
    env, learner = learner_on(agent, folder, episodes=1, dtype=dtype, device=device)
    update_once(env, learner)
    env, learner = learner_on(agent, folder, episodes=episodes, dtype=dtype, device=device)
    env.process.execution.microbatch = rows
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    start = now(device)
    update_once(env, learner)
    seconds = now(device) - start
    peak = torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else float("nan")
    return f"| `{agent}` | {dtype} | {episodes} | {rows} | {seconds:.0f} | {peak:.1f} |"


def main(
    device: str = "cpu", dtype: str = "float32", episodes: str = "64", microbatch: str = "16"
) -> None:
    """Print the table."""
    folder = pipeline(full=device != "cpu")
    name = torch.cuda.get_device_name() if device != "cpu" else "CPU, small pipeline: a rehearsal"
    count = int(episodes) if device != "cpu" else 4
    rows = min(int(microbatch), count)
    speed = images_per_second(folder, device, dtype, count, rows)
    print(f"{name}, torch {torch.__version__}: {speed:.2f} images/s of a rollout\n", flush=True)
    print("| agent | dtype | episodes | microbatch | s per update | peak GB |")
    print("|---|---|---:|---:|---:|---:|", flush=True)
    for agent in ("ctrl", "adjoint", "ppo"):
        print(row(agent, folder, device, dtype, count, rows), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
