"""Words of a command that override a config, such as agent=ctrl; no torch is imported."""

from collections.abc import Mapping, Sequence
from typing import Any

from ctrl_rl.errors import ConfigError, one_line


def parse(word: str) -> Any:
    """Parse one override by Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if "=" not in word and not word.startswith("~"):
        raise ConfigError(f"'{word}' is no override; write key=value, such as agent=ctrl")
    try:
        parsed = OverridesParser.create().parse_override(word)
    except HydraException as error:
        reason = one_line(error).partition(" See https")[0]
        key = key_of(word)
        raise ConfigError(
            f"cannot read {word} ({reason}); close every bracket and quote, and quote "
            f"text with special characters: \"{key}='…'\""
        ) from error
    if parsed.is_sweep_override():
        raise ConfigError(f"{word} has several values; give one, or a list in brackets: [a,b]")
    return parsed


def in_hydras_words(overrides: Sequence[str], known: Mapping[str, str]) -> list[str]:
    """The same for Hydra, which says ~group where a group's choice is null.

    Args:
        overrides: as a user writes them.
        known: default choice of every group.
    """
    nullable = {group for group, choice in known.items() if choice == "null"}
    chosen = [(word, parse(word)) for word in overrides]
    nulls = {each.key_or_group: each.value() is None for _, each in chosen}  # by the last word
    kept = [
        word
        for word, each in chosen
        if each.key_or_group not in nullable
        or not (nulls[each.key_or_group] or each.value() is None)
    ]
    return [*kept, *(f"~{group}" for group in sorted(nullable) if nulls.get(group))]


def key_of(word: str) -> str:
    """The key of an override, without what says to add or delete it."""
    return word.partition("=")[0].lstrip("+~")
