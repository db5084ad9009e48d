"""Whether runs are still those of an earlier commit, bit for bit: python tests/bitwise.py COMMIT.

Every agent is trained for two updates on `mixture2d` and `digits`, some with settings that take
other paths through the code, three on `faces`, and two on small random pipelines with prompts.
Metrics, weights, training state and summary are compared; what is measured in seconds is not.
What the earlier commit gave is kept in build/bitwise, for the next comparison with it.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "bitwise"
MODELS = KEPT / "models"
IN_SECONDS = {"wall_s", "machine"}
# Past episodes, which are named as keys of rollouts are: what learning makes of them is compared.
NOT_COMPARED = ("replay.",)
TINY = [
    *("threads=1", "logger=none", "trainer.updates=2", "trainer.batch_size=8"),
    *("trainer.log_z_samples=8", "evaluation.prior_samples=16", "evaluation.policy_samples=4"),
    *("evaluation.exact_samples=4", "kernel.num_steps=4"),
]
OTHER_PATHS = {
    "adjoint-chunks": "agent=adjoint agent.steps_at_once=3",
    "alignprop-checkpointing": "agent=alignprop agent.checkpointing=true",
    "ctrl-average": "agent=ctrl trainer.ema_decay=0.9",
    "ctrl-checkpointing": "agent=ctrl agent.checkpointing=true",
    "ctrl-guided": "agent=ctrl guidance=reward",
    "ctrl-parts": "agent=ctrl trainer.microbatch=3",
    "ctrl-truncated": "agent=ctrl agent.truncation=2",
    "ctrl-truncated-uniform": "agent=ctrl agent.truncation=uniform",
    "draft-two": "agent=draft agent.truncation=2",
    "draft_lv-three": "agent=draft_lv agent.renoise=3",
    "h_transform-whole": "agent=h_transform trainer.updates=5",
    "nft-pieces": "agent=nft agent.epochs=2 agent.minibatches=2 agent.step_chunks=2",
    "ppo-pieces": "agent=ppo agent.epochs=2 agent.minibatches=2 agent.step_chunks=2",
    "refl-two": "agent=refl agent.one_step_of=2",
    "rwr-pieces": "agent=rwr agent.step_chunks=2",
    "tb-replay": "agent=tb agent.replay=12",
}


def cases(tree: Path) -> dict[str, list[str]]:
    """Overrides by the name of a run, for the agents of a tree."""
    found = {}
    for task in ("mixture2d", "digits"):
        for agent in sorted(file.stem for file in (tree / "configs" / "agent").glob("*.yaml")):
            found[f"{task}-{agent}"] = [f"env={task}", *TINY, f"agent={agent}"]
        for name, words in OTHER_PATHS.items():
            found[f"{task}-{name}"] = [f"env={task}", *TINY, *words.split()]
    for agent in ("ctrl", "ppo", "h_transform"):
        found[f"faces-{agent}"] = ["env=faces", *TINY, f"agent={agent}"]
    pipeline = [
        *("env=sd_compressibility", "prior.prompts=[ant,bee]", "prior.evaluation_prompts=[cat]"),
        *(f"reward.classifiers.size.folder={MODELS / 'sizes'}", *TINY, "trainer.microbatch=null"),
    ]
    found["sd-ctrl"] = [*pipeline, f"prior.path={MODELS / 'sd'}", "agent=ctrl"]
    found["sd3-grpo"] = [*pipeline, f"prior.path={MODELS / 'sd3'}", "kernel=flow_sde", "agent=grpo"]
    return found


def make_models() -> None:
    """The small pipelines and their judge, made once for both sides."""
    import judges
    import pipelines
    import torch

    for name, make in {
        "sd": pipelines.stable_diffusion,
        "sd3": pipelines.stable_diffusion_3,
        "sizes": lambda path: judges.fitted(path, num_labels=4),
    }.items():
        if not (MODELS / name).exists():
            torch.manual_seed(0)
            make(MODELS / name)


def run_all(runs: dict[str, list[str]], out: str) -> None:
    """Train in this process, with the code that is on its path."""
    from ctrl_rl import cli

    main = getattr(cli, "main", None) or import_module("ctrl_rl.cli.main").main  # once a module

    for name, words in runs.items():
        if main(["train", *words, f"run.root={out}", f"run.name={name}"]) != 0:
            print(f"{name}: failed", flush=True)


def train_in(tree: Path, runs: dict[str, list[str]], out: Path) -> None:
    """Train in a process of its own, with the code of a tree; what was printed is in log.txt."""
    if not runs:
        return
    out.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tree), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    call = "import bitwise, json, sys; bitwise.run_all(json.loads(sys.argv[1]), sys.argv[2])"
    with (out / "log.txt").open("w") as log:
        subprocess.run(
            [sys.executable, "-c", call, json.dumps(runs), str(out)],
            cwd=out,
            env=environment,
            stdout=log,
            stderr=log,
            check=True,
        )


def differences(before: Path, after: Path) -> Iterator[str]:
    """What two runs do not share."""
    if not (before / "summary.json").exists() or not (after / "summary.json").exists():
        yield "no summary"
        return
    old, new = (
        _compared(json.loads((run / "summary.json").read_text())) for run in (before, after)
    )
    if old != new:
        yield f"summary.json: {[key for key in old if old[key] != new.get(key)]}"
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (before, after)]
    old, new = ([_compared(json.loads(line)) for line in each] for each in lines)
    if old != new:
        yield "metrics.jsonl"
    yield from _different_tensors(before, after)


def _different_tensors(before: Path, after: Path) -> Iterator[str]:
    from safetensors.torch import load_file

    for old in sorted((before / "checkpoints").rglob("*.safetensors")):
        one, other = load_file(old), load_file(after / old.relative_to(before))
        kept = [name for name in {**one, **other} if not name.startswith(NOT_COMPARED)]
        for name in kept:
            a, b = one.get(name), other.get(name)
            if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
                yield f"{old.parent.name}/{old.name}: {name} is not in both"
            elif a.numpy().tobytes() != b.numpy().tobytes():
                yield f"{old.parent.name}/{old.name}: {name}"


def _compared(value: Any) -> Any:
    """The same without what is measured in seconds, and text for numbers, as nan is not nan."""
    if isinstance(value, dict):
        return {key: _compared(each) for key, each in value.items() if key not in IN_SECONDS}
    return repr(value)


def compare(commit: str, only: str = "") -> int:
    """Train on both sides and print what differs; the exit status is 1 if anything does."""
    full = _git("rev-parse", "--short=12", commit).decode().strip()
    there, here = KEPT / full, KEPT / "here"
    if not (there / "tree").exists():
        (there / "tree").mkdir(parents=True)
        with tarfile.open(fileobj=io.BytesIO(_git("archive", full))) as archive:
            archive.extractall(there / "tree", filter="tar")
    make_models()
    runs = {name: words for name, words in cases(there / "tree").items() if only in name}
    done = {name for name in runs if (there / "runs" / name / "summary.json").exists()}
    train_in(there / "tree", {n: w for n, w in runs.items() if n not in done}, there / "runs")
    shutil.rmtree(here, ignore_errors=True)
    train_in(ROOT, runs, here)
    bad = 0
    for name in runs:
        found = list(differences(there / "runs" / name, here / name))
        bad += bool(found)
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            print(f"{name}: {'; '.join(found[:3])}{more}")
    print(f"{len(runs) - bad} of {len(runs)} runs are those of {full}, bit for bit")
    return min(bad, 1)


def _git(*words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True).stdout


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("which commit? for example: python tests/bitwise.py HEAD~1 [part of a name]")
    sys.exit(compare(*sys.argv[1:]))
