"""Seconds and peak memory of updates on a full-size Stable Diffusion 1.5 with random weights.

    python docs/full_size.py [cuda] [float16] [microbatch]

builds the pipeline in `runs/full_size` (about 4 GB), then makes one rollout and two updates of
`ctrl`, `adjoint` and `ppo` with 64 episodes of 50 steps at 512 x 512, and prints images per second
of the rollout, seconds and peak memory of the second update; `docs/memory_plan.py` has what is to
be expected.
Without a device it is a rehearsal: the small pipeline of the tests, 4 episodes, on the CPU.
"""

import sys
import time
from pathlib import Path

import memory_plan
import torch

from ctrl_rl.checks import fit_microbatch, set_microbatch
from ctrl_rl.replay import Replay
from ctrl_rl.rollouts import rollout

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
        unet=UNet(**memory_plan.UNET),
        vae=AutoencoderKL(**memory_plan.VAE),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=PNDMScheduler.from_config(memory_plan.SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def measured(agent: str, folder: Path, device: str, dtype: str, rows: int | None) -> str:
    """A row of the table."""
    episodes = memory_plan.EPISODES if device != "cpu" else 4
    env, learner = memory_plan.learner_on(
        agent, folder, episodes=episodes, dtype=dtype, device=device
    )
    if rows is None:
        rows = fit_microbatch(env, learner) if device != "cpu" else episodes
    set_microbatch(env, learner, rows)

    def synchronised() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return time.monotonic()

    (plan,) = learner.agent.plans.values()
    replay = Replay(plan, env.generator)
    with torch.no_grad():
        start = synchronised()
        rollout(env, learner.policy)
        images = episodes / (synchronised() - start)
    seconds = 0.0
    for update in range(2):
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        start = synchronised()
        episode = learner.agent.prepare(rollout(env, learner.policy, plan=plan))
        for pieces in replay.batches(episode, learner.policy):
            for piece in pieces:
                learner.backward(learner.agent.loss(piece))
            learner.step(update)
        seconds = synchronised() - start
    peak = torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else float("nan")
    return f"| `{agent}` | {dtype} | {rows} | {images:.2f} | {seconds:.0f} | {peak:.1f} |"


def main(device: str = "cpu", dtype: str = "float32", rows: str | None = None) -> None:
    """Print the table."""
    folder = pipeline(full=device != "cpu")
    name = torch.cuda.get_device_name() if device != "cpu" else "CPU, small pipeline: a rehearsal"
    print(f"{name}, torch {torch.__version__}\n")
    print("| agent | dtype | microbatch | images/s of a rollout | s per update | peak GB |")
    print("|---|---|---:|---:|---:|---:|")
    for agent in ("ctrl", "adjoint", "ppo"):
        print(measured(agent, folder, device, dtype, int(rows) if rows else None), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
