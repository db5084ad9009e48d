"""What the commands do; one function per command, each returns the exit code."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from ctrl_rl import build
from ctrl_rl.api import LoadedRun, load_run
from ctrl_rl.checks import check_start
from ctrl_rl.composition import saved
from ctrl_rl.errors import ConfigError, did_you_mean
from ctrl_rl.evaluation.evaluate import Evaluation, prior_log_z
from ctrl_rl.evaluation.evaluate import evaluate as run_evaluation
from ctrl_rl.evaluation.pictures import draw_grid, draw_samples
from ctrl_rl.interrupts import Interrupted
from ctrl_rl.learner import Learner
from ctrl_rl.progress import bar, say, show_summary
from ctrl_rl.runs import Checkpoint, Run
from ctrl_rl.trainer import Trainer

_LOG_Z_SEED = 777_777  # of the live gap estimate's prior samples, apart from training's

# Both talk of what the commands report in their own words.
logging.getLogger("torchrl").setLevel(logging.WARNING)
logging.getLogger("hydra").setLevel(logging.CRITICAL)


def train(config: DictConfig) -> int:
    """Train, then evaluate."""
    Run.check_free(build.build_run_plan(config))
    return _train(config, None, None)


def resume(words: list[str]) -> int:
    """Go on with `resume=runs/x`, then evaluate; a finished run is evaluated again."""
    options, rest = _take(words, "resume", "checkpoint")
    if rest:
        raise ConfigError(
            f"resume goes on with the run's own config; drop {rest[0]}, "
            "or start a new run without resume"
        )
    if "resume" not in options:
        raise ConfigError(f"checkpoint={options['checkpoint']} of which run? add resume=runs/…")
    run = Run.open(Path(options["resume"]))
    checkpoint = run.load(_whole("checkpoint", options.get("checkpoint")))
    return _train(saved(run.config_file), run, checkpoint)


def _train(config: DictConfig, run: Run | None, checkpoint: Checkpoint | None) -> int:
    # Everything is built and checked before any compute, and that before a folder is made.
    build.set_threads(config)
    settings, plan = build.build_trainer_config(config), build.build_evaluation_plan(config)
    make_logger = build.build_logger(config)
    process = build.build_process(config)
    agent = build.build_agent(config, process)
    learner = Learner(build.build_policy(config, process), agent, settings)
    heldout = build.build_heldout(config, process)
    env = build.build_env(config, process)
    if checkpoint is None:
        check_start(env, learner)
    log_z = prior_log_z(
        process, settings.log_z_samples, batch_size=plan.batch_size, seed=_LOG_Z_SEED
    )
    process.prior_calls = process.reward_calls = 0  # training is counted, not its preparation
    if run is None:
        run = Run.create(build.build_run_plan(config), OmegaConf.to_yaml(config))
    try:
        say(f"{run.path}: training {config.choices.agent} on {config.env.name}")
        with bar("train", settings.updates) as report:
            trainer = Trainer(
                env=env,
                learner=learner,
                run=run,
                log_z=log_z,
                logger=make_logger(run),
                report=lambda figures: report(int(figures["update"]), _shown(figures)),
            )
            if checkpoint is not None:
                trainer.restore(checkpoint)
            report(trainer.update, {})
            trainer.train()
        cost = trainer.checkpoint().cost
        with bar("evaluate", len(process.conditions)) as report:
            evaluation = run_evaluation(
                process,
                learner.result,
                plan,
                heldout=heldout,
                report=lambda done, total: report(done, {}),
            )
        _write(run, config, cost, evaluation)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; go on with: ctrl-rl train resume={run.path}") from None
    return 0


def _shown(figures: dict[str, float]) -> dict[str, float]:
    names = {"reward": "reward", "kl": "kl", "gap": "gap_nats"}
    return {short: figures[name] for short, name in names.items() if name in figures}


def evaluate(words: list[str]) -> int:
    """Measure a run again; `evaluation.*` overrides change how."""
    options, overrides = _take(words, "run", "checkpoint")
    accepted = ("run", "checkpoint", "evaluation.…")
    for word in overrides:
        if not word.startswith("evaluation."):
            hint = did_you_mean(word.partition("=")[0], accepted)
            raise ConfigError(f"evaluate does not take '{word}'; {hint}")
    loaded = _load(options, "evaluate run=runs/demo")
    loaded.config = saved(loaded.run.config_file, overrides)
    build.set_threads(loaded.config)
    plan = build.build_evaluation_plan(loaded.config)
    with bar("evaluate", len(loaded.env.process.conditions)) as report:
        evaluation = loaded.evaluate(plan, lambda done, total: report(done, {}))
    _write(loaded.run, loaded.config, loaded.cost, evaluation)
    return 0


def sample(words: list[str]) -> int:
    """Draw samples of a run into a picture and an array."""
    options, rest = _take(words, "run", "checkpoint", "n", "seed", "strength", "out", "control")
    named = {word.partition("=")[0]: word.partition("=")[2] for word in rest}
    for key in named:
        if not key.startswith("control."):
            accepted = ("run", "control", "n", "seed", "strength", "out", "checkpoint")
            raise ConfigError(f"sample does not take '{key}'; {did_you_mean(key, accepted)}")
    if named and "control" in options:
        raise ConfigError(f"give control= or {next(iter(named))}=, not both")
    n, seed = _whole("n", options.get("n", "16")), _whole("seed", options.get("seed", "0"))
    strength = _number("strength", options.get("strength", "1.0"))
    labels: Any = {key.partition(".")[2]: _whole(key, value) for key, value in named.items()}
    labels = labels or _whole("control", options.get("control"))
    assert n is not None and seed is not None
    loaded = _load(options, "sample run=runs/demo control=3")
    if labels is None:
        names = ", ".join(f"control.{name}=" for name in loaded.env.process.controls)
        raise ConfigError(f"no control given; add control=LABEL, or {names}LABEL")
    samples = loaded.sample(labels, n=n, seed=seed, strength=strength)
    asked = ",".join(word.removeprefix("control.") for word in rest) or options["control"]
    folder = Path(options.get("out", loaded.run.path))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"sample-{asked}-strength{strength:g}-seed{seed}"
    np.savez(f"{file}.npz", samples=samples.cpu().numpy())
    title = f"{loaded.run.path.name}: control {asked}, strength {strength:g}"
    draw_grid(Path(f"{file}.png"), samples, title=title)
    say(f"{n} samples in {file}.png and .npz")
    return 0


def pretrain(config: DictConfig) -> int:
    """Train a prior."""
    from ctrl_rl.pretrain import pretrain as run_pretrain

    plan = build.build_pretrain_plan(config)
    dataset = build.build_dataset(config)
    say(f"{config.out}: pretraining the prior {config.choices.prior}")
    with bar("pretrain", plan.updates) as report:
        figures = run_pretrain(
            dataset, plan, Path(config.out), report=lambda done, loss: report(done, {"loss": loss})
        )
    text = ", ".join(f"{name} {value:,.4g}" for name, value in figures.items())
    say(f"{config.out}: {text}")
    return 0


def classifier(config: DictConfig) -> int:
    """Fit and calibrate a classifier."""
    report = build.fit_classifier(config)
    say(f"{config.out}: {report.num_examples} examples of {config.classifier.report_split}")
    say(f"accuracy {report.accuracy:.3f}, macro F1 {report.macro_f1:.3f}")
    say(f"temperature {report.temperature:.3f}")
    say(f"negative log-likelihood {report.nll_before:.4f} -> {report.nll_after:.4f} nats")
    say(f"expected calibration error {report.ece_before:.4f} -> {report.ece_after:.4f}")
    return 0


def _write(run: Run, config: DictConfig, cost: dict[str, Any], evaluation: Evaluation) -> None:
    head = {"task": config.env.name, "agent": config.choices.agent, "seed": config.seed}
    machine = {"device": config.device, "torch": torch.__version__, "cores": os.cpu_count()}
    summary = {**head, **cost, **evaluation.summary, "machine": machine}
    run.write_summary(summary)
    lines = {"policy": f"gap {summary['gap_nats']:.2f} nats"}
    for source in evaluation.samples:
        row = summary if source == "policy" else summary[source]
        if row["heldout_accuracy"] is not None:
            text = f"held-out accuracy {row['heldout_accuracy']:.0%}"
            lines[source] = f"{lines[source]}, {text}" if source in lines else text
    draw_samples(
        run.path / "samples.png",
        samples=evaluation.samples,
        conditions=evaluation.conditions,
        title=f"{run.path.name}: {head['agent']} on {head['task']}",
        figures=lines,
    )
    show_summary(run.path, summary)


def _load(options: dict[str, str], example: str) -> LoadedRun:
    if "run" not in options:
        raise ConfigError(f"which run? for example: ctrl-rl {example}")
    return load_run(options["run"], _whole("checkpoint", options.get("checkpoint")))


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


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name}={text} is not a number") from None
