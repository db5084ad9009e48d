"""Measure how the memory of one update grows with K: `python docs/memory.py`, two minutes.

Writes `memory.png` beside this script and prints a table. Two figures per update on the digits task
with four episodes, in MB: what autograd has saved for the backward pass at most at one time, the
weights not counted, and the peak of everything that was allocated during the update, the rollout's
own latents and the gradients included. Every agent keeps the latents of all K steps. The
activations of one step that checkpointing makes again are in the second figure only.
"""

import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.learning.learner import Learner
from ctrl_rl.learning.replay import Replay
from ctrl_rl.learning.update import update
from ctrl_rl.runs.build import build_agent, build_policy, build_process, build_trainer_config
from ctrl_rl.runs.compose import compose

_STEPS = (10, 20, 40, 80)
_AGENTS = {
    "ctrl": ["agent=ctrl"],
    "ctrl, checkpointing": ["agent=ctrl", "agent.checkpointing=true"],
    "adjoint": ["agent=adjoint"],
    "adjoint, one step at once": ["agent=adjoint", "agent.steps_at_once=1"],
}


class _Saved:
    """A tensor that autograd keeps; it dies with the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedBytes:
    """Counts what autograd has saved, every storage once, without `parameters`."""

    def __init__(self, parameters: list[Tensor]) -> None:
        # By the storage's own address, which differs on the meta device too.
        self.left_out = {p.untyped_storage()._cdata for p in parameters}
        self.holders: dict[int, int] = {}  # storage: how many saved tensors share it
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> _Saved:
        """Called by autograd with every tensor that it saves."""
        saved = _Saved(tensor.detach())  # an output of its own node would keep the graph alive
        storage = tensor.untyped_storage()
        where, size = storage._cdata, storage.nbytes()
        if where not in self.left_out:
            self.holders[where] = self.holders.get(where, 0) + 1
            if self.holders[where] == 1:
                self.now += size
                self.peak = max(self.peak, self.now)
            weakref.finalize(saved, self._free, where, size)
        return saved

    def _free(self, where: int, size: int) -> None:
        self.holders[where] -= 1
        if self.holders[where] == 0:
            self.now -= size


def one_update(words: list[str], num_steps: int) -> tuple[Callable[[], None], list[Tensor]]:
    """What makes one update of the digits task, and the parameters of all networks in it."""
    config = compose("train", ["env=digits", f"kernel.num_steps={num_steps}", *words])
    process = build_process(config)
    policy, agent = build_policy(config, process), build_agent(config, process)
    learner = Learner(policy, agent, build_trainer_config(config))
    env = LatentEnv(process, num_envs=4)

    def run() -> None:
        replay = Replay(agent.plan, env.generator)
        update(env, learner, agent, replay, step=partial(learner.step, 0))

    return run, [*process.parameters(), *process.buffers(), *policy.parameters()]


def saved_mb(words: list[str], num_steps: int) -> float:
    """Most that autograd has saved at one time, MB."""
    run, parameters = one_update(words, num_steps)
    count = SavedBytes(parameters)
    with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda saved: saved.tensor):
        run()
    return count.peak / 1e6


def peak_mb(words: list[str], num_steps: int) -> float:
    """Peak of all that one update allocates, MB."""
    run, _ = one_update(words, num_steps)
    run()  # the optimizer's moments are there from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return float(torch.tensor([size for _, size in changes]).cumsum(0).max()) / 1e6


def main() -> None:
    """Print the table and draw the picture."""
    torch.set_num_threads(1)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.9), sharey=True, layout="constrained")
    print("| | | " + " | ".join(f"K = {k}" for k in _STEPS) + " |")
    print("|---|---|" + "---:|" * len(_STEPS))
    measures = {"saved for the backward pass": saved_mb, "peak of all memory": peak_mb}
    for axis, (title, measure) in zip(axes, measures.items(), strict=True):
        for name, words in _AGENTS.items():
            values = [measure(words, k) for k in _STEPS]
            print(f"| {title} | {name} | " + " | ".join(f"{v:.2f}" for v in values) + " |")
            axis.plot(_STEPS, values, "o-", label=name)
        axis.set(title=title, xlabel="K, denoising steps", xscale="log", yscale="log")
        axis.set_xticks(_STEPS, [str(k) for k in _STEPS])
        axis.minorticks_off()
    axes[0].set_ylabel("MB")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(Path(__file__).parent / "memory.png", dpi=120)


if __name__ == "__main__":
    main()
