"""Commands that make what tasks start from: priors, data sets and classifiers.

Each is resumed by calling it again.
"""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from ctrl_rl.controls import Categorical, described
from ctrl_rl.learning.checks import compile_networks
from ctrl_rl.marker import locked
from ctrl_rl.runs import build
from ctrl_rl.runs.arguments import folder_of
from ctrl_rl.runs.progress import bar, say


def pretrain(config: DictConfig) -> int:
    """Train a prior."""
    from ctrl_rl.learning.pretrain import pretrain as run_pretrain

    build.set_up_process(config)
    device, plan = build.build_device(config), build.build_pretrain_plan(config)
    out, dataset = folder_of(config.out, "out"), build.build_dataset(config)
    say(f"{out}: pretraining the prior {config.choices.prior}")
    with bar("pretrain", plan.updates) as report:
        figures = run_pretrain(
            dataset,
            plan,
            out,
            device=device,
            report=lambda done, loss: report(done, {"loss": loss}),
        )
    text = ", ".join(f"{name} {value:,.4g}" for name, value in figures.items())
    say(f"{out}: {text}")
    return 0


def dataset(config: DictConfig) -> int:
    """Draw and label pictures."""
    from ctrl_rl.learning.generation import check_folder, generate_dataset

    build.set_up_process(config)
    plan, folder = build.build_generation_plan(config), folder_of(config.out, "out")
    groups = ("prior", "kernel", "reward", "control_law")
    decides: dict[str, Any] = {key: OmegaConf.to_container(config[key]) for key in groups}
    decides["prior"].pop("evaluation_prompts", None)  # they are not drawn
    check_folder(folder, plan, decides)
    backend = build.build_compile_backend(config)
    with locked(folder):
        process = build.build_process(config)
        if backend is not None:
            compile_networks(backend, process)
        say(f"{folder}: {plan.n} pictures of the prior {config.choices.prior}")
        with bar("dataset", plan.n) as report:
            counts = generate_dataset(
                process, plan, folder, settings=decides, report=lambda done: report(done, {})
            )
    for name, numbers in counts.items():
        labels = [process.controls[name].shown(place) for place in range(len(numbers))]
        pairs = zip(labels, numbers, strict=True)
        say(f"{name}: {', '.join(f'{label} x {n}' for label, n in pairs)}")
        if 0 in numbers:
            say(f"no picture has {name}={labels[numbers.index(0)]}; draw more, or other prompts")
    return 0


def classifier(config: DictConfig) -> int:
    """Fit and calibrate a classifier."""
    build.set_up_process(config)
    dataset = build.build_dataset(config)
    report = build.fit_classifier(config, dataset)
    say(f"{config.out}: {report.num_examples} examples of {config.classifier.report_split}")
    say(described({"labels": Categorical.of(dataset.num_labels, dataset.label_names)}))
    say(f"accuracy {report.accuracy:.3f}, macro F1 {report.macro_f1:.3f}")
    say(f"temperature {report.temperature:.3f}")
    say(f"negative log-likelihood {report.nll_before:.4f} -> {report.nll_after:.4f} nats")
    say(f"expected calibration error {report.ece_before:.4f} -> {report.ece_after:.4f}")
    return 0
