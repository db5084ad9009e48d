"""From a config to a finished run folder: training, evaluation, summary and picture.

`ctrl-rl train` and every cell of a benchmark call this one function.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.errors import NonFiniteError, RunError, one_line
from ctrl_rl.evaluation.compare import compare
from ctrl_rl.evaluation.evaluate import EvaluationPlan, evaluate, prior_log_z
from ctrl_rl.evaluation.samplers import PolicySampler, Sampler
from ctrl_rl.evaluation.side_by_side import MOST_CONDITIONS
from ctrl_rl.interrupts import Interrupted, stop_on_interrupt
from ctrl_rl.learning.checkpoint import NO_TRAINING, Checkpoint
from ctrl_rl.learning.checks import check_start, compile_networks
from ctrl_rl.learning.learner import AUTO, Learner
from ctrl_rl.learning.trainer import Trainer
from ctrl_rl.learning.update import fit_microbatch, rehearse
from ctrl_rl.rewards.classifier import LabelModel
from ctrl_rl.runs import build
from ctrl_rl.runs.folder import Run
from ctrl_rl.runs.loggers import Logger
from ctrl_rl.runs.parts import NONE, Makers
from ctrl_rl.runs.progress import bar, note, say, waiting
from ctrl_rl.runs.results import write_results
from ctrl_rl.runs.resuming import resume_command

# Nats per dimension. A compiled forward pass rounds differently with a backward pass than without
# one: clean estimates of Stable Diffusion's architecture were up to 4e-6 apart.
_COMPILED_TOLERANCE = 1e-4
_PICTURE_SEED = 900_000  # added to the evaluation's, for the noise of pictures and films
_LOG_Z_SEED = 777_777  # of the live gap estimate's prior samples, apart from training's

# Both log what the project reports in its own words.
logging.getLogger("torchrl").setLevel(logging.WARNING)
logging.getLogger("hydra").setLevel(logging.CRITICAL)


def train_and_evaluate(
    config: DictConfig,
    run: Run | None = None,
    checkpoint: int | None = None,
    *,
    quiet: bool = False,
    given: Makers = NONE,
) -> Run:
    """Train, then evaluate.

    Args:
        config: a resolved `train` config.
        run: the folder to resume in; None makes the one that `config.run` names.
        checkpoint: update of the checkpoint to resume at; None for the newest.
        quiet: no progress and no table.
        given: what makes parts that the config cannot build, see `ctrl_rl.runs.parts`.

    Returns:
        The finished run.

    Raises:
        CtrlError: a refused setting, a folder that another process uses or that cannot be written,
            or training that failed.
        Interrupted: the user pressed Ctrl-C, or the machine stops; the message says how to resume.
    """
    plan = build.build_run_plan(config)
    where = Run(plan.path) if run is None else run
    if run is None:
        Run.check_free(plan)
    try:
        with where.locked():
            resumed = None if run is None else run.load(checkpoint)
            return _train_and_evaluate(config, run, resumed, given, quiet=quiet)
    except KeyboardInterrupt:
        left = f"resume with: {resume_command(where, config)}"
        nothing = "nothing was written yet"
        raise Interrupted(f"interrupted; {left if where.checkpoints() else nothing}") from None


def _train_and_evaluate(
    config: DictConfig,
    run: Run | None,
    checkpoint: Checkpoint | None,
    given: Makers,
    *,
    quiet: bool,
) -> Run:
    """The same in a locked folder, from a checkpoint that was read."""
    # Build and check everything before any compute, and compute before writing the folder.
    build.set_up_process(config)
    plan, log = build.build_evaluation_plan(config), build.build_logger(config)
    with waiting("loading and checking prior, reward and policy", quiet=quiet):
        env, learner, heldout = _prepared(config, given, fresh=checkpoint is None, quiet=quiet)
    process, settings = env.process, learner.config
    # With prompts, each one of training would need its own prior samples.
    log_z = None
    if process.prior.prompts is None and process.conditions.size <= plan.most_conditions:
        n = settings.log_z_samples
        note(f"estimating log Z from {n} samples of the prior", quiet=quiet)
        log_z = prior_log_z(process, n, batch_size=plan.batch_size, seed=_LOG_Z_SEED)
    process.prior_calls = process.reward_calls = 0  # training is counted, not its preparation
    if run is None:
        run = Run.create(build.build_run_plan(config), OmegaConf.to_yaml(config))
    if not quiet:
        say(f"{run.path}: training {config.choices.agent} on {config.env.name}")
    with bar("train", settings.updates, quiet=quiet) as report:
        trainer = Trainer(env, learner, log_z)
        if checkpoint is not None:
            _restore(trainer, checkpoint, run)
        report(trainer.update, {})
        logger = log.open(run.path, run.id, trainer.update)
        _train(trainer, run, logger, report, resume=resume_command(run, config))
    cost = run.load().cost  # the last checkpoint's, as a later evaluation reads it
    sampler = PolicySampler(process, learner.result)
    evaluate_into(run.path, config, sampler, plan, heldout=heldout, cost=cost, quiet=quiet)
    return run


def _prepared(
    config: DictConfig, given: Makers, *, fresh: bool, quiet: bool
) -> tuple[LatentEnv, Learner, Mapping[str, LabelModel]]:
    """Env, learner and held-out judges, built; a fresh policy is checked on its first episodes."""
    settings, backend = build.build_trainer_config(config), build.build_compile_backend(config)
    process = build.build_process(config, given)
    agent = build.build_agent(config, process, given)
    learner = Learner(build.build_policy(config, process, given), agent, settings)
    heldout = build.build_heldout(config, process)
    env = build.build_env(config, process)
    if backend is not None:
        compile_networks(backend, process, learner.policy, learner.result)
    rows = settings.microbatch
    if rows == AUTO:
        # Only accelerators report full memory.
        rows = fit_microbatch(env, learner) if env.device.type == "cuda" else None
        config.trainer.microbatch = rows  # stored in the run: its bits depend on it
        if not quiet:
            say(f"trainer.microbatch=auto is {rows or 'null: all at once on this device'}")
    assert rows is None or isinstance(rows, int)
    process.execution.microbatch = rows
    if fresh or backend is not None:  # compiling may fail elsewhere
        check_start(env, learner, tolerance=0.0 if backend is None else _COMPILED_TOLERANCE)
    if settings.denoiser_calls is not None:
        learner.config = settings.within_budget(rehearse(env, learner))
    return env, learner, heldout


def _restore(trainer: Trainer, checkpoint: Checkpoint, run: Run) -> None:
    try:
        trainer.restore(checkpoint)
    except RunError as error:
        raise RunError(f"{run.path} cannot be resumed: {error}") from error
    run.forget_after(checkpoint.update)


def _train(
    trainer: Trainer,
    run: Run,
    logger: Logger | None,
    report: Callable[[int, dict[str, float]], None],
    *,
    resume: str,
) -> None:
    """Make the remaining updates, each with a line of metrics, some with a checkpoint."""
    config = trainer.config
    if trainer.update == 0:
        run.save(trainer.checkpoint(), keep=config.keep_checkpoints)
    with stop_on_interrupt() as stop:
        try:
            for figures in trainer:
                run.log(figures)
                if logger is not None:
                    for name, value in figures.items():
                        logger.log_scalar(name, value, step=trainer.update)
                report(trainer.update, _shown(figures))
                stopped, last = stop.is_set(), trainer.update == config.updates
                if stopped or last or trainer.update % config.checkpoint_every == 0:
                    run.save(trainer.checkpoint(), keep=config.keep_checkpoints)
                if stopped:
                    raise Interrupted(
                        f"stopped after update {trainer.update} of {config.updates} and saved; "
                        f"resume with: {resume}"
                    )
        except NonFiniteError as error:
            good = run.path / "checkpoints" / f"{run.checkpoints()[-1]:06d}"
            raise NonFiniteError(
                f"update {trainer.update + 1}: {error}; the last good checkpoint is {good}"
            ) from error
        except OSError as error:
            raise RunError(
                f"update {trainer.update} cannot be written: {one_line(error)}; the checkpoints "
                f"before it are whole. Make room, then: {resume}"
            ) from error


def evaluate_method(config: DictConfig, *, quiet: bool = False) -> Run:
    """Measure a method without training, into its own run folder.

    Args:
        config: a resolved `evaluate` config.
        quiet: no progress and no table.
    """
    run_plan = build.build_run_plan(config)
    Run.check_free(run_plan)
    build.check_unused(config)
    with Run(run_plan.path).locked():
        build.set_up_process(config)
        plan, process = build.build_evaluation_plan(config), build.build_process(config)
        heldout, sampler = build.build_heldout(config, process), build.build_method(config, process)
        run = Run.create(run_plan, OmegaConf.to_yaml(config))
        if not quiet:
            say(f"{run.path}: {config.choices.method} on {config.env.name}, without any training")
        evaluate_into(
            run.path, config, sampler, plan, heldout=heldout, cost=NO_TRAINING, quiet=quiet
        )
    return run


def evaluate_into(
    folder: Path,
    config: DictConfig,
    sampler: Sampler,
    plan: EvaluationPlan,
    *,
    heldout: Mapping[str, LabelModel],
    cost: dict[str, Any],
    quiet: bool = False,
) -> None:
    """Measure a sampler, and write pictures and summary.json into a folder.

    Args:
        folder: of the run, or of one evaluation.
        config: the run's config.
        sampler: a trained policy, or a method.
        plan: settings of the evaluation.
        heldout: held-out classifiers by control.
        cost: of training, from its checkpoint.
        quiet: no progress and no table.
    """
    conditions = plan.conditions_of(sampler.process)
    note(f"drawing {plan.prior_samples} samples of the prior to measure by", quiet=quiet)
    with bar("evaluate", len(conditions), quiet=quiet) as report:
        evaluation = evaluate(
            sampler, plan, heldout=heldout, report=lambda done, total: report(done, {})
        )
    note("drawing pictures", quiet=quiet)  # apart from the figures
    compared = compare(sampler, conditions[:MOST_CONDITIONS], seed=plan.seed + _PICTURE_SEED)
    write_results(folder, config, cost, evaluation, compared, quiet=quiet)


def _shown(figures: dict[str, float]) -> dict[str, float]:
    names = {"reward": "reward", "kl": "kl", "gap": "gap_nats"}
    return {short: figures[name] for short, name in names.items() if name in figures}
