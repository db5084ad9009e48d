"""Errors that a user can act on.

Every error that the project raises on purpose derives from `CtrlError` and is one line: what was
given, what is accepted, how to fix it. The command line prints it without a traceback and exits
with code 2, or 130 after Ctrl-C or SIGTERM.
"""

from collections.abc import Iterable
from difflib import get_close_matches

TOO_LARGE = (
    "this does not fit into memory; make what is largest smaller, such as trainer.batch_size, "
    "evaluation.batch_size, trainer.microbatch or a width"
)
# Of torch's plain RuntimeErrors: from the allocator of a CPU, and of sizes beyond 64 bits.
_OF_MEMORY = (
    "DefaultCPUAllocator",
    "Storage size calculation overflowed",
    "numel: integer multiplication overflow",
    "Overflow when unpacking long",
)


class CtrlError(Exception):
    """Base of all errors that the project raises on purpose."""


class ConfigError(CtrlError):
    """A setting is unknown, out of range or does not fit the others."""


class InvariantError(CtrlError):
    """A mathematical guarantee failed before the first update."""


class NonFiniteError(CtrlError):
    """A reward, loss or gradient became NaN or infinite during a run."""


class RunError(CtrlError):
    """A run folder or one of its checkpoints is missing, incomplete or corrupt."""


class RunInUseError(RunError):
    """Another process writes into the run folder."""


def did_you_mean(given: str, accepted: Iterable[str]) -> str:
    """Return a hint that names the nearest accepted spelling, then all of them.

    Args:
        given: what the user wrote.
        accepted: the spellings that would have worked.

    Returns:
        ``"did you mean 'ctrl'? accepted: ctrl, ppo"``, without the question if nothing is close.
    """
    names = sorted(str(name) for name in accepted)
    near = get_close_matches(given, names, n=1, cutoff=0.5)
    question = f"did you mean '{near[0]}'? " if near else ""
    return f"{question}accepted: {', '.join(names) if names else '(nothing)'}"


def one_line(error: BaseException, longest: int | None = None) -> str:
    """The message of a library's error on one line, cut to `longest` characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:longest]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that something is larger than memory: Python's, NumPy's or torch's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in _OF_MEMORY)


def import_hint(name: str, error: BaseException) -> str:
    """Why code of the user's cannot be imported, and what to do about it.

    Args:
        name: dotted name of a module, or of something in one.
        error: of the import.
    """
    top, cause = name.partition(".")[0], error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, ModuleNotFoundError) and cause.name == top:
        return (
            f"there is no module {top} here; run from the folder that has it, or put that folder "
            "on PYTHONPATH"
        )
    return one_line(error)


def check_choice(where: str, given: object, accepted: Iterable[str]) -> None:
    """Refuse a value that is not an accepted name.

    Args:
        where: dotted name of the setting.
        given: its value.
        accepted: the names that would have worked.

    Raises:
        ConfigError: names the setting, the value and the nearest accepted name.
    """
    names = list(accepted)
    if given not in names:
        raise ConfigError(f"unknown {where} '{given}'; {did_you_mean(str(given), names)}")


def check_sizes(where: str, **sizes: int) -> None:
    """Raise `ConfigError` for a size below 1; `where` is the config's path to them, or ""."""
    for name, size in sizes.items():
        if size < 1:
            full = ".".join(filter(None, (where, name)))
            raise ConfigError(f"{full}={size} must be 1 or more")
