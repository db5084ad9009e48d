"""The commands, one function each; each returns the exit code.

Those that make what tasks start from are in `ctrl_rl.cli.offline`.
"""

import hashlib
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from omegaconf import DictConfig

from ctrl_rl.assets import resolve
from ctrl_rl.cli.offline import classifier as classifier
from ctrl_rl.cli.offline import dataset as dataset
from ctrl_rl.cli.offline import pretrain as pretrain
from ctrl_rl.cli.words import WORDS
from ctrl_rl.controls import described
from ctrl_rl.errors import ConfigError, did_you_mean
from ctrl_rl.evaluation.film import NO_FILM, draw_film
from ctrl_rl.evaluation.pictures import draw_strips
from ctrl_rl.evaluation.side_by_side import BEFORE
from ctrl_rl.runs import build
from ctrl_rl.runs.compose import saved
from ctrl_rl.runs.folder import Run
from ctrl_rl.runs.loaded import LoadedRun, load_run
from ctrl_rl.runs.progress import say
from ctrl_rl.runs.train import evaluate_into, train_and_evaluate
from ctrl_rl.runs.train import evaluate_method as run_method

if TYPE_CHECKING:
    from ctrl_rl.benchmark.grid import Grid


_MEANS = {0.0: ": the prior", 1.0: ": as trained"}  # of strengths
_LONGEST_NAME = 60  # characters of the condition in a file's name


def train(config: DictConfig) -> int:
    """Train, then evaluate."""
    Run.check_free(build.build_run_plan(config))
    train_and_evaluate(config)
    return 0


def resume(words: list[str]) -> int:
    """Resume the run of `resume=runs/x`, then evaluate; a finished run is evaluated again."""
    options, rest = _take(words, *WORDS["resume"])
    if rest:
        raise ConfigError(
            f"resume uses the run's own config; drop {rest[0]}, or start a new run without resume"
        )
    if "resume" not in options:
        raise ConfigError(f"checkpoint={options['checkpoint']} of which run? add resume=runs/…")
    run = Run.open(Path(options["resume"]))
    config = saved(run.config_file, trust=_trusted(options))
    if config.get("method") is not None:
        raise ConfigError(f"{run.path} is of a method without training; evaluate it instead")
    train_and_evaluate(config, run, _whole("checkpoint", options.get("checkpoint")))
    return 0


def evaluate_run(words: list[str]) -> int:
    """Measure a run again; `evaluation.*` overrides change how."""
    options, overrides = _take(words, *WORDS["evaluate"])
    for word in overrides:
        if not word.startswith("evaluation."):
            hint = did_you_mean(word.partition("=")[0], WORDS["evaluate"])
            raise ConfigError(f"evaluate does not take '{word}'; {hint}")
    loaded = _load(options, "evaluate run=runs/demo")
    run = loaded.run
    loaded.config = saved(run.config_file, overrides, trust=_trusted(options))
    build.set_up_process(loaded.config)
    plan = build.build_evaluation_plan(loaded.config)
    heldout = build.build_heldout(loaded.config, loaded.env.process)
    with run.locked():
        folder = run.evaluation(loaded.update)
        folder.mkdir(parents=True, exist_ok=True)
        evaluate_into(
            folder, loaded.config, loaded.sampler, plan, heldout=heldout, cost=loaded.cost
        )
    return 0


def evaluate_method(config: DictConfig) -> int:
    """Measure a method that needs no training."""
    Run.check_free(build.build_run_plan(config))
    run_method(config)
    return 0


def sample(words: list[str]) -> int:
    """Draw samples of a run into a picture, an array and a film; all strengths share the noise."""
    options, rest = _take(words, *WORDS["sample"])
    named = {word.partition("=")[0]: word.partition("=")[2] for word in rest}
    for key in named:
        if not key.startswith("control."):
            raise ConfigError(f"sample does not take '{key}'; {did_you_mean(key, WORDS['sample'])}")
    if named and "control" in options:
        raise ConfigError(f"give control= or {next(iter(named))}=, not both")
    n, seed = _whole("n", options.get("n", "16")), _whole("seed", options.get("seed", "0"))
    strengths = _strengths(options)
    labels = {key.partition(".")[2]: label for key, label in named.items()}
    control = labels or options.get("control")
    assert n is not None and seed is not None
    loaded = _load(options, "sample run=runs/demo control=3")
    if control is None and loaded.env.process.conditions.controls:
        known = loaded.env.process.conditions.controls
        missing = described({f"control.{name}=VALUE": control for name, control in known.items()})
        raise ConfigError(f"no control given; add one or more of {missing}")
    policies = [loaded.strip(control, n=n, seed=seed, strength=each) for each in strengths]
    title = f"{loaded.run.path.name}: {policies[0].title}"
    if "strengths" in options:
        called = [f"strength {each:g}{_MEANS.get(each, '')}" for each in strengths]
    else:
        called = [f"after: strength {strengths[0]:g}"]
    strips = [replace(each, title=name) for each, name in zip(policies, called, strict=True)]
    if len(strips) == 1 or strengths[0] != 0:
        prior = loaded.strip(control, n=n, seed=seed, strength=0)
        strips = [replace(prior, title=BEFORE), *strips]
    asked = ",".join(word.removeprefix("control.") for word in rest)
    asked = asked or options.get("control", "none")
    folder = Path(options.get("out", loaded.run.path))
    folder.mkdir(parents=True, exist_ok=True)
    safe = re.sub(r"[^\w=,.-]+", "_", asked)
    if safe != asked or len(safe) > _LONGEST_NAME:  # a prompt may hold anything
        safe = f"{safe[:_LONGEST_NAME]}-{hashlib.sha256(asked.encode()).hexdigest()[:6]}"
    plural = "s" if "strengths" in options else ""
    shown = ",".join(f"{each:g}" for each in strengths)
    file = folder / f"sample-{safe}-strength{plural}{shown}-seed{seed}"
    arrays = [strip.samples.cpu().numpy() for strip in policies]
    if plural:
        np.savez(f"{file}.npz", samples=np.stack(arrays), strengths=np.array(strengths))
    else:
        np.savez(f"{file}.npz", samples=arrays[0])
    draw_strips(Path(f"{file}.png"), strips, title=title)
    film = ", .gif" if draw_film(Path(f"{file}.gif"), strips) else ""
    say(f"{n} samples in {file}.png{film} and .npz")
    if not film and strips[0].samples.ndim == 4:
        say(NO_FILM)
    return 0


def export(words: list[str]) -> int:
    """Write a run's policy for diffusers."""
    from ctrl_rl.export.lora import export_run, push
    from ctrl_rl.export.pipeline import EXPORT

    options, rest = _take(words, *WORDS["export"])
    if rest:
        key = rest[0].partition("=")[0]
        raise ConfigError(f"export does not take '{key}'; {did_you_mean(key, WORDS['export'])}")
    if "out" not in options:
        raise ConfigError("where to? for example: ctrl-rl export run=runs/sd out=exported")
    private, hub, base = options.get("private", "false"), options.get("hub"), options.get("base")
    if private not in ("true", "false"):
        raise ConfigError(f"private={private} must be true or false")
    if "private" in options and hub is None:
        raise ConfigError("private= is for the hub; add hub=NAME, such as hub=me/sd-sizes")
    EXPORT.check_replaceable(Path(options["out"]).expanduser().resolve())
    loaded = _load(options, "export run=runs/sd out=exported")
    model = base or str(loaded.config.prior.get("path", ""))
    if hub is not None and resolve(model).is_dir():
        raise ConfigError(
            f"hub={hub}: the base model, {model}, is a folder of this machine; give base=ID, by "
            "which others find it"
        )
    export_run(loaded, Path(options["out"]), base=base, hub=hub)
    say(f"{options['out']}: a LoRA for stock pipelines, and the folder of a ControlledPipeline")
    if hub is not None:
        say(push(Path(options["out"]), hub, private=private == "true"))
    return 0


def benchmark(grid: "Grid") -> int:
    """Run every unfinished cell of a grid, then write the report."""
    from ctrl_rl.benchmark.report import write_report
    from ctrl_rl.benchmark.run import LauncherError, run_grid

    try:
        run_grid(grid)
    except LauncherError:
        write_report(grid)  # of the cells that are done
        raise
    write_report(grid)
    return 0


def _load(options: dict[str, str], example: str) -> LoadedRun:
    if "run" not in options:
        raise ConfigError(f"which run? for example: ctrl-rl {example}")
    checkpoint = _whole("checkpoint", options.get("checkpoint"))
    return load_run(options["run"], checkpoint, trust=_trusted(options))


def _trusted(options: dict[str, str]) -> list[str]:
    """From `trust=my_package` or `trust=[my_rewards,my_networks]`; for this command only."""
    words = options.get("trust", "").strip()
    if words and "" not in sys.path:
        sys.path.append("")  # a trusted module may lie in the working directory
    return [word.strip() for word in words.removeprefix("[").removesuffix("]").split(",")]


def _take(words: list[str], *names: str) -> tuple[dict[str, str], list[str]]:
    """Split off the `key=value` words whose key is one of `names`."""
    taken, rest = {}, []
    for word in words:
        key, separator, value = word.partition("=")
        if not separator:
            raise ConfigError(f"'{word}' is no setting; write key=value, such as run=runs/demo")
        if key in names:
            taken[key] = value
        else:
            rest.append(word)
    return taken, rest


def _whole(name: str, text: str | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        raise ConfigError(f"{name}={text} is not a whole number") from None


def _strengths(options: dict[str, str]) -> list[float]:
    """From `strength=1.5` or `strengths=[0,0.5,1]`, ascending; 1 without either."""
    if "strengths" not in options:
        return [_number("strength", options.get("strength", "1.0"))]
    if "strength" in options:
        raise ConfigError("give strength= or strengths=, not both")
    words = options["strengths"].strip()
    if not (words.startswith("[") and words.endswith("]") and words[1:-1].strip()):
        raise ConfigError(f"strengths={words} must be a list of numbers, such as [0,0.5,1,1.5,2]")
    strengths = [_number("strengths", word.strip()) for word in words[1:-1].split(",")]
    if not all(0 <= each < math.inf for each in strengths):
        raise ConfigError(f"strengths={words} must be >= 0; 0 is the prior, 1 the policy")
    if len(set(strengths)) < len(strengths):
        raise ConfigError(f"strengths={words} names a strength twice")
    return sorted(strengths)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name}={text} is not a number") from None
