"""What the commands do; one function per command, each (overrides, config folders) -> exit code."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from ctrl_rl import build
from ctrl_rl.api import LoadedRun, load_run
from ctrl_rl.composition import compose
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.errors import ConfigError, did_you_mean
from ctrl_rl.evaluation.evaluate import Evaluation, evaluate as run_evaluation, prior_log_z
from ctrl_rl.evaluation.pictures import draw_grid, draw_samples
from ctrl_rl.progress import bar, show_summary
from ctrl_rl.runs import Run
from ctrl_rl.trainer import Trainer

_LOG_Z_SEED = 777_777  # of the live gap estimate's prior samples, apart from training's


def train(overrides: list[str], extra: list[str]) -> int:
    """Train, or go on with `resume=runs/x`, then evaluate."""
    options, overrides = _take(overrides, "resume", "checkpoint")
    if "resume" in options:
        if overrides:
            raise ConfigError(
                f"resume goes on with the run's own config; drop {overrides[0]}, "
                "or start a new run without resume"
            )
        run = Run.open(Path(options["resume"]))
        config = OmegaConf.create(run.config_yaml)
        assert isinstance(config, DictConfig)
        checkpoint = run.load(_whole("checkpoint", options.get("checkpoint")))
    else:
        config, run, checkpoint = compose("train", overrides, extra), None, None
    # Everything is built and checked before the folder is made and before any compute.
    settings, plan = build.build_trainer_config(config), build.build_evaluation_plan(config)
    process = build.build_process(config)
    agent = build.build_agent(config, process)
    policy = build.build_policy(config, process)
    heldout = build.build_heldout(config, process)
    env = LatentEnv(
        process, num_envs=settings.batch_size, seed=config.seed, device=build.build_device(config)
    )
    if run is None:
        folder = Path(config.run.root) / config.run.name
        run = Run.create(folder, OmegaConf.to_yaml(config), overwrite=config.run.overwrite)
    log_z = prior_log_z(
        process, settings.log_z_samples, batch_size=plan.batch_size, seed=_LOG_Z_SEED
    )
    with bar(f"training {config.choices.agent} on {config.env.name}", settings.updates) as report:
        trainer = Trainer(
            env=env,
            policy=policy,
            agent=agent,
            config=settings,
            run=run,
            log_z=log_z,
            logger=build.build_logger(config, run),
            report=lambda figures: report(
                int(figures["update"]),
                {name: figures[name] for name in ("reward", "kl", "gap_nats") if name in figures},
            ),
        )
        if checkpoint is not None:
            trainer.restore(checkpoint)
        trainer.train()
    calls = {
        "steps": trainer.update,
        "denoiser_calls": process.prior_calls + policy.calls,
        "reward_calls": process.reward_calls,
        "wall_s": round(trainer.wall_s, 1),
    }
    with bar("evaluating", len(process.conditions)) as report:
        evaluation = run_evaluation(
            process,
            trainer.learner.result,
            plan,
            heldout=heldout,
            report=lambda done, total: report(done, {}),
        )
    _write(run, config, calls, evaluation)
    return 0


def evaluate(overrides: list[str], extra: list[str]) -> int:
    """Measure a run again; `evaluation.*` overrides change how."""
    del extra
    options, overrides = _take(overrides, "run", "checkpoint")
    loaded = _load(options, "evaluate run=runs/demo")
    for override in overrides:
        if not override.startswith("evaluation."):
            raise ConfigError(f"evaluate takes run=, checkpoint= and evaluation.*, not {override}")
    merged = OmegaConf.merge(loaded.config, OmegaConf.from_dotlist(overrides))
    assert isinstance(merged, DictConfig)
    loaded.config = merged
    with bar("evaluating", len(loaded.env.process.conditions)) as report:
        evaluation = loaded.evaluate(lambda done, total: report(done, {}))
    kept = ("steps", "denoiser_calls", "reward_calls", "wall_s")
    before = loaded.summary
    _write(loaded.run, loaded.config, {name: before.get(name) for name in kept}, evaluation)
    return 0


def sample(overrides: list[str], extra: list[str]) -> int:
    """Draw samples of a run into a picture and an array."""
    del extra
    options, rest = _take(overrides, "run", "checkpoint", "n", "seed", "strength", "out", "control")
    named, rest = _take_prefix(rest, "control.")
    if rest:
        accepted = ("run", "control", "n", "seed", "strength", "out", "checkpoint")
        key = rest[0].partition("=")[0]
        raise ConfigError(f"unknown key '{key}'; {did_you_mean(key, accepted)}")
    loaded = _load(options, "sample run=runs/demo control=3")
    if not named and "control" not in options:
        names = ", ".join(f"control.{name}=" for name in loaded.env.process.controls)
        raise ConfigError(f"no control given; add control=LABEL, or {names}LABEL")
    labels: Any = (
        {name: _whole(f"control.{name}", value) for name, value in named.items()}
        if named
        else _whole("control", options["control"])
    )
    n = _whole("n", options.get("n", "16"))
    assert n is not None
    seed = _whole("seed", options.get("seed", "0"))
    assert seed is not None
    strength = _number("strength", options.get("strength", "1.0"))
    samples = loaded.sample(labels, n=n, seed=seed, strength=strength)
    asked = ",".join(f"{k}={v}" for k, v in named.items()) or options["control"]
    name = f"sample-{asked}-strength{strength:g}-seed{seed}"
    folder = Path(options.get("out", loaded.run.path))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{name}.npz", samples=samples.cpu().numpy())
    title = f"{loaded.run.path.name}: control {asked}, strength {strength:g}"
    draw_grid(folder / f"{name}.png", samples, title=title)
    Console(stderr=True).print(f"{n} samples in {folder / name}.png and .npz")
    return 0


def pretrain(overrides: list[str], extra: list[str]) -> int:
    """Train a prior."""
    from ctrl_rl.pretrain import pretrain as run_pretrain

    config = compose("pretrain", overrides, extra)
    plan = build.build_pretrain_plan(config)
    dataset = build.build_dataset(config)
    with bar(f"pretraining {config.choices.prior}", plan.updates) as report:
        figures = run_pretrain(
            dataset, plan, Path(config.out), report=lambda done, loss: report(done, {"loss": loss})
        )
    text = ", ".join(f"{name} {value:,.4g}" for name, value in figures.items())
    Console(stderr=True).print(f"{config.out}: {text}")
    return 0


def classifier(overrides: list[str], extra: list[str]) -> int:
    """Fit and calibrate a classifier."""
    config = compose("classifier", overrides, extra)
    report = build.fit_classifier(config)
    console = Console(stderr=True)
    console.print(f"{config.out}: {report.num_examples} examples of {config.classifier.report_split}")
    console.print(f"accuracy {report.accuracy:.3f}, macro F1 {report.macro_f1:.3f}")
    console.print(f"temperature {report.temperature:.3f}")
    console.print(f"negative log-likelihood {report.nll_before:.4f} -> {report.nll_after:.4f} nats")
    console.print(f"expected calibration error {report.ece_before:.4f} -> {report.ece_after:.4f}")
    return 0


def _write(run: Run, config: DictConfig, calls: dict[str, Any], evaluation: Evaluation) -> None:
    head = {"task": config.env.name, "agent": config.choices.agent, "seed": config.seed}
    machine = {"device": config.device, "torch": torch.__version__, "cores": os.cpu_count()}
    summary = {**head, **calls, **evaluation.summary, "machine": machine}
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


def _take(overrides: list[str], *names: str) -> tuple[dict[str, str], list[str]]:
    """Split off the `key=value` words whose key is one of `names`."""
    pairs = [(word, *word.partition("=")[::2]) for word in overrides]
    taken = {key: value for _, key, value in pairs if key in names}
    return taken, [word for word, key, _ in pairs if key not in names]


def _take_prefix(overrides: list[str], prefix: str) -> tuple[dict[str, str], list[str]]:
    words = [word for word in overrides if word.startswith(prefix)]
    taken, _ = _take([word.removeprefix(prefix) for word in words], *_keys(words, prefix))
    return taken, [word for word in overrides if word not in words]


def _keys(words: list[str], prefix: str) -> list[str]:
    return [word.removeprefix(prefix).partition("=")[0] for word in words]


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
