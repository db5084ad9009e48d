"""Sums: the smallest work that can be put aside, and what it writes."""

import json
import os
import re

import torch

from ctrl_rl.products import Product
from ctrl_rl.unfinished import unfinished

SUM = Product(
    name="sum",
    files=re.compile(r"sum\.json|parts/\d+\.txt"),
    told_by="sum.json",
    fields=frozenset({"sum", "terms"}),
)


class Sum:
    """Adds seeded numbers; `at` is called after each."""

    def __init__(self, total=6, at=lambda done: None, size=1):
        self.done, self.total, self.at, self.size = 0, total, at, size
        self.generator = torch.Generator().manual_seed(0)
        self.value = torch.zeros(size, dtype=torch.float64)

    def step(self):
        self.value += torch.rand(self.size, generator=self.generator, dtype=torch.float64) / 3
        self.done += 1
        self.at(self.done)
        return self.value[0].item()

    def state(self):
        done = torch.tensor(self.done)
        return {"value": self.value, "generator": self.generator.get_state(), "done": done}

    def restore(self, state):
        self.done, self.value = int(state["done"]), state["value"]
        self.generator.set_state(state["generator"])


def add(out, *, writing=lambda: None, settings=None, **given):
    """Sum into a folder; returns the numbers of the updates that were made."""
    steps, made = Sum(**given), []
    with unfinished(out, SUM, settings or {"size": 1, "rate": 0.5}) as work:
        work.finish(steps, lambda done, loss: made.append(done))
        with work.result() as folder:
            (folder / "sum.json").write_text(json.dumps({"sum": loss(steps), "terms": 6}))
            writing()
    return made


def loss(steps):
    return steps.value.sum().item().hex()


def everything(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def send(number, when):
    return lambda done: os.kill(os.getpid(), number) if done == when else None
