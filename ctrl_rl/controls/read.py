"""Controls as configs and rewards write them."""

from collections.abc import Mapping, Sequence
from typing import Any

from ctrl_rl.controls.categorical import Categorical, check_label_names
from ctrl_rl.controls.continuous import Continuous
from ctrl_rl.controls.control import Control
from ctrl_rl.errors import ConfigError


def as_control(given: Any, where: str) -> Control:
    """A control from its description in a config or reward.

    Args:
        given: a control; a number of labels; names of labels; or {"low": …, "high": …}.
        where: source of the description, for the message.

    Raises:
        ConfigError: none of these.
    """
    if isinstance(given, Control):
        return given
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return Categorical.of(given)
    if isinstance(given, Mapping) and set(given) == {"low", "high"}:
        ends = [given["low"], given["high"]]
        if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends):
            raise ConfigError(f"{where}={given!r}: low and high must be numbers")
        return Continuous(float(ends[0]), float(ends[1]))
    if isinstance(given, Sequence) and list(given) == [False, True]:
        given = ["no", "yes"]  # what yaml makes of these words without quotes
    if isinstance(given, Sequence) and not isinstance(given, str) and given:
        check_label_names(where, given, len(given))
        return Categorical(tuple(given))
    raise ConfigError(
        f"{where}={given!r} is no control; give a number of labels, their names such as "
        "[no, yes], or {low: -1, high: 1} for a number"
    )


def described(controls: Mapping[str, Control]) -> str:
    """Controls with their values, such as "glasses (no, yes), digit (0 to 9)"."""
    return ", ".join(f"{name} ({control.described()})" for name, control in controls.items())
