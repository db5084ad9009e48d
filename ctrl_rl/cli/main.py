"""The command line: `ctrl-rl COMMAND [key=value ...]`.

Nothing heavy is imported before a command needs it: help and typos get an answer at once.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from textwrap import wrap
from typing import NoReturn

from ctrl_rl import __version__
from ctrl_rl.benchmark.grid import build_grid
from ctrl_rl.cli.words import WORDS
from ctrl_rl.errors import TOO_LARGE, CtrlError, did_you_mean, is_out_of_memory, one_line
from ctrl_rl.interrupts import Interrupted, interrupt_on_terminate
from ctrl_rl.runs.compose import check_folders, compose, config_folder, defaults, files, groups

_COMMANDS = {
    "train": "train an agent in a task, then evaluate it",
    "evaluate": "measure a run again, or what needs no training",
    "certify": "measure a policy that was trained elsewhere, a LoRA of a diffusers pipeline",
    "sample": "draw from a run",
    "export": "write a run as a LoRA and a pipeline for diffusers",
    "dataset": "draw pictures of a prior and label them, for a classifier",
    "pretrain": "train a prior on a dataset",
    "benchmark": "compare agents over tasks and seeds",
    "classifier": "fit and calibrate a classifier",
    "list": "show every choice of every config group",
}
_ALSO = {"train": ["resume"]}  # what else a command does, with words of its own
_HEADINGS = {"resume": "to resume a run", "evaluate": "to measure a run again"}
# What a command does with a composed config.
_OF_CONFIG = {"evaluate": "evaluate_method", "certify": "evaluate_method"}
_UNUSED = {"certify": ("agent", "guidance", "method", "policy")}  # groups of its config
_EXAMPLES = {
    "train": """\
  ctrl-rl train env=gaussian seed=3 trainer.updates=100
  ctrl-rl train resume=runs/demo              resume after an interruption
  ctrl-rl train resume=runs/demo checkpoint=50
  ctrl-rl train resume=runs/mine trust=my_rewards   a run that names code of yours""",
    "evaluate": """\
  ctrl-rl evaluate run=runs/demo
  ctrl-rl evaluate run=runs/demo checkpoint=50 evaluation.policy_samples=1024
  ctrl-rl evaluate method=rejection env=faces
  ctrl-rl evaluate method=reconstruction_guidance method.strength=2 env=faces""",
    "certify": """\
  ctrl-rl certify policy=my_lora env=sd_compressibility reward=jpeg device=cuda
  ctrl-rl certify policy=my_lora/pytorch_lora_weights.safetensors prior.path=my/base env=…
policy= is a file of safetensors, or the folder that diffusers' save_lora_weights
wrote; the prior is its base model. It is evaluate method=lora method.path=….""",
    "sample": """\
  ctrl-rl sample run=runs/demo control=3 n=64 seed=1
  ctrl-rl sample run=runs/demo control=3 "strengths=[0,0.5,1,1.5,2]"
  ctrl-rl sample run=runs/demo control.digit=3 strength=1.5 out=pictures""",
    "export": """\
  ctrl-rl export run=runs/sd out=exported
  ctrl-rl export run=runs/sd out=exported hub=me/sd-sizes private=true
  ctrl-rl export run=runs/sd out=exported hub=me/sd-sizes base=owner/model
hub= uploads it; base= is how others find a base model that is a folder here.""",
    "benchmark": """\
  ctrl-rl benchmark agents=[ctrl,reinforce] tasks=[gaussian] seeds=[100,101,102]
  ctrl-rl benchmark launcher=joblib +launcher_settings.n_jobs=4
  ctrl-rl benchmark denoiser_calls=5000000 "overrides=['kernel.num_steps=20']"
  ctrl-rl benchmark "+settings.ppo=['agent.clip=0.1']" root=runs/tuned out=reports/tuned
Re-run the command to resume; the report is written again.""",
    "dataset": """\
  ctrl-rl dataset env=digits n=2000 out=datasets/drawn
  ctrl-rl dataset env=… prior.path=path/to/pipeline reward=jpeg n=10000
Re-run the command to resume.""",
    "pretrain": """\
  ctrl-rl pretrain prior=digits out=priors/mine
Re-run the command to resume.""",
    "classifier": """\
  ctrl-rl classifier classifier=digits out=classifiers/mine
Re-run the command to resume.""",
    "list": "  ctrl-rl list --config-dir my_configs",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 2 for a refused setting, 130 after Ctrl-C."""
    interrupt_on_terminate()
    try:
        return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except (CtrlError, OSError) as error:
        print(f"ctrl-rl: {error}", file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 2
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # while Python 3.11 made a class
            return _interrupted()
        if is_out_of_memory(error):
            print(f"ctrl-rl: {TOO_LARGE} ({one_line(error, 200)})", file=sys.stderr)
            return 2
        if type(error).__module__.partition(".")[0] not in ("hydra", "omegaconf"):
            raise  # a bug, here or in a plug-in, deserves its traceback
        print(f"ctrl-rl: config: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2


def _interrupted() -> int:
    print("ctrl-rl: interrupted", file=sys.stderr)
    return 130


def _dispatch(given: list[str]) -> int:
    if given and not given[0].startswith("-") and given[0] not in _COMMANDS:
        raise CtrlError(f"unknown command '{given[0]}'; {did_you_mean(given[0], _COMMANDS)}")
    parser = _parser()
    options, words = parser.parse_known_args(given)
    command = options.command
    wrong = [word for word in words if word.startswith("-")]
    if wrong:
        raise CtrlError(f"unknown option {wrong[0]}; see ctrl-rl {command or ''} --help")
    if command is None:
        parser.print_help()
        return 0
    extra = getattr(options, "config_dir", [])
    if command == "list":
        return _list(words, extra)
    if command == "train" and any(word.startswith(("resume=", "checkpoint=")) for word in words):
        command = "resume"
    if command == "certify":
        words = _with_method(words)
    if command == "evaluate" and not any(word.startswith("method=") for word in words):
        command = "evaluate_run"
    _search_working_directory(command in _main_configs())
    if command in _main_configs():
        config = compose(command, words, extra)  # before torch: errors come at once
        asked = build_grid(config, extra) if command == "benchmark" else config
        from ctrl_rl.cli import commands

        return int(getattr(commands, _OF_CONFIG.get(command, command))(asked))
    from ctrl_rl.cli import commands

    return int(getattr(commands, command)(words))


def _with_method(words: Sequence[str]) -> list[str]:
    """The words of `certify` as those of a config, in which a policy is another thing."""
    if not any(word.startswith(("policy=", "method.path=")) for word in words):
        raise CtrlError("which policy? for example: ctrl-rl certify policy=my_lora env=…")
    quoted = {word: word.removeprefix("policy=").replace("'", r"\'") for word in words}
    return [f"method.path='{quoted[w]}'" if w.startswith("policy=") else w for w in words]


def _search_working_directory(wanted: bool) -> None:
    """Find plug-ins in the working directory, or not: a run from elsewhere may lie in it."""
    sys.path[:] = [each for each in sys.path if each] + [""] * wanted


def _main_configs() -> list[str]:
    return sorted(file.stem for file in config_folder().glob("*.yaml"))


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise CtrlError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    in_lines = partial(argparse.RawDescriptionHelpFormatter, max_help_position=16)
    parser = _Parser(
        prog="ctrl-rl",
        description="Steer a pretrained diffusion model with soft RL, certified in nats.",
        epilog=_describe(defaults("train"), "train"),
        formatter_class=in_lines,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in _COMMANDS.items():
        known = defaults(name) if name in _main_configs() else {}
        known = {group: one for group, one in known.items() if group not in _UNUSED.get(name, ())}
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            usage=f"ctrl-rl {name} {'' if name == 'list' else '[key=value ...]'}",
            epilog="\n\n".join(filter(None, _about(name, known))),
            formatter_class=in_lines,
            allow_abbrev=False,
        )
        if name in (*_main_configs(), "list"):
            command.add_argument(
                "--config-dir",
                action="append",
                default=[],
                metavar="DIR",
                help="a folder with config groups of your own, such as DIR/agent/mine.yaml; "
                "its targets may be Python files of the working directory",
            )
    return parser


def _about(name: str, known: Mapping[str, str]) -> Iterator[str]:
    """What follows the description of a command: examples, its words, its config groups."""
    yield f"examples:\n{_EXAMPLES[name]}"
    for command in (name, *_ALSO.get(name, ())):
        if command in WORDS:
            yield "\n".join([f"{_HEADINGS.get(command, 'words')}, as key=value:", *_told(command)])
    if known:
        yield _describe(known, name)


def _told(command: str) -> Iterator[str]:
    """Every word of a command with its meaning, in lines."""
    width = max(map(len, WORDS[command])) + 2
    for word, meaning in WORDS[command].items():
        lines = wrap(meaning, 94 - width)
        yield f"  {word:<{width}}{lines[0]}"
        yield from (f"  {'':<{width}}{line}" for line in lines[1:])


def _describe(known: Mapping[str, str], name: str) -> str:
    if name == "benchmark":  # has plain settings instead of groups
        text = (config_folder() / f"{name}.yaml").read_text().partition("\n\n")[2]
        settings = [f"  {line}" for line in text.splitlines()]
        return "\n".join(["settings, as key=value, and what they are by default:", *settings])
    lines = [line for group in known for line in _choices(group)]
    keys = f"Keys inside a group: trainer.updates=100. All choices: ctrl-rl list. {name} is"
    keys = f"{keys} configs/{name}.yaml."
    return "\n".join(["config groups, as group=choice:", *lines, "", keys])


def _choices(group: str) -> list[str]:
    """`group=one|other`, wrapped into lines."""
    lines: list[str] = []
    for name in files(group):
        if lines and len(lines[-1]) + len(name) < 78:
            lines[-1] += f"|{name}"
        else:
            lines.append(f"    |{name}" if lines else f"  {group}={name}")
    return lines


def _list(words: Sequence[str], extra: Sequence[str]) -> int:
    if words:
        raise CtrlError(f"list takes no '{words[0]}'; only --config-dir DIR")
    check_folders(extra)
    for group in groups(extra):
        print(group)
        for name, file in files(group, extra).items():
            text = file.read_text(errors="replace").splitlines()
            notes = [line[1:].strip() for line in text if line.startswith("#")]
            notes = [note for note in notes if not note.startswith("@")]
            print(f"  {name:<14} {notes[0] if notes else ''}".rstrip())
    return 0
