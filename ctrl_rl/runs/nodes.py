"""From one node of a config to one object, with errors that name the node."""

import re
from typing import Any, TypeVar

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ctrl_rl.errors import ConfigError, CtrlError, is_out_of_memory, one_line
from ctrl_rl.runs.arguments import check_arguments, check_node

Config = TypeVar("Config")


def make(config: DictConfig, where: str, /, **arguments: Any) -> Any:
    """Instantiate the node at the dotted name `where`, with arguments that no config can hold.

    Raises:
        ConfigError: the node does not fit its target; errors of the project pass unchanged.
    """
    check_node(OmegaConf.to_container(config, resolve=True), where, arguments)
    try:
        built = instantiate(config, _convert_="all")
        return built(**arguments) if arguments else built
    except (InstantiationException, TypeError, ValueError, ImportError) as error:
        nested = re.search(r"full_key: (\S+)\s*$", str(error))  # hydra's word for the node
        place = nested[1] if nested else where
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if is_out_of_memory(cause):
            raise cause from None
        if isinstance(cause, CtrlError):
            named = str(cause).startswith(f"{where}.")  # already names the setting
            raise (cause if named else type(cause)(f"{place}: {cause}")) from None
        raise ConfigError(f"{place} cannot be built: {one_line(cause)}") from error


def settings(kind: type[Config], config: Any, where: str) -> Config:
    """A settings dataclass from a config node."""
    values = keys_of(config, where)
    check_arguments(kind, values, where)
    return kind(**values)


def keys_of(config: Any, where: str) -> dict[str, Any]:
    """The plain entries of the node at `where`."""
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{where}={config} must be keys and values; set {where}.KEY=… instead")
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
