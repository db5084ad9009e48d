"""The command line: `ctrl-rl COMMAND [key=value ...]`.

Nothing heavy is imported before a command needs it, so that help and typing errors answer at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from ctrl_rl import __version__
from ctrl_rl.composition import choices, groups
from ctrl_rl.errors import CtrlError

_COMMANDS = {
    "train": "train an agent in a task, then evaluate it",
    "evaluate": "measure a run again: ctrl-rl evaluate run=runs/demo",
    "sample": "draw from a run: ctrl-rl sample run=runs/demo control=3 n=64 strength=1.5",
    "pretrain": "train a prior on a dataset: ctrl-rl pretrain prior=digits",
    "classifier": "fit and calibrate a classifier: ctrl-rl classifier classifier=digits",
    "list": "show every choice of every config group",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 2 for a refused setting, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options, overrides = parser.parse_known_args(given)
    if options.command is None:
        parser.print_help()
        return 0
    wrong = [word for word in overrides if word.startswith("-")]
    try:
        if wrong:
            raise CtrlError(f"unknown option {wrong[0]}; see ctrl-rl {options.command} --help")
        return _command(options.command)(overrides, options.config_dir)
    except CtrlError as error:
        from ctrl_rl.trainer import Interrupted

        print(f"ctrl-rl: {error}", file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 2
    except KeyboardInterrupt:
        print("ctrl-rl: interrupted", file=sys.stderr)
        return 130


def _command(name: str) -> Callable[[list[str], list[str]], int]:
    if name == "list":
        return _list
    from ctrl_rl import commands

    run: Callable[[list[str], list[str]], int] = getattr(commands, name)
    return run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ctrl-rl",
        description="Steer a pretrained diffusion model with soft RL, certified in nats.",
        epilog="Every command takes Hydra overrides, such as agent=ctrl env=digits seed=3.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text}.",
            usage=f"ctrl-rl {name} [--config-dir DIR] [key=value ...]",
            epilog=_describe_groups(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "--config-dir",
            action="append",
            default=[],
            metavar="DIR",
            help="a folder with config groups of your own, such as DIR/agent/mine.yaml",
        )
    return parser


def _describe_groups(extra: Sequence[str] = ()) -> str:
    lines = [f"  {group}={'|'.join(choices(group, extra))}" for group in groups()]
    return "config groups:\n" + "\n".join(lines)


def _list(overrides: list[str], extra: list[str]) -> int:
    del overrides
    print(_describe_groups(extra))
    return 0


if __name__ == "__main__":
    sys.exit(main())
