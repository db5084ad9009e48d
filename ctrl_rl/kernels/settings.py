"""A scheduler's config as this project reads it: checked, and without its class."""

import inspect
from collections.abc import Mapping
from typing import Any

from ctrl_rl.errors import ConfigError, did_you_mean
from ctrl_rl.kernels.accepted import DIFFUSION, FAMILIES, FLOW, FLOW_MATCHING, Family, shown

CLASS = "_class_name"
_UNSAID = "_use_default_values"  # where diffusers keeps the names of what a config did not say


def scheduler_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is read of a scheduler's config: the noise law and the steps, checked.

    Args:
        config: of any scheduler of diffusers, or settings without a class, as in this project's
            yamls.

    Returns:
        Settings without a class. Those of the noise law are the class's own defaults where the
        config is silent. Those of the steps are left out there, and every kernel has its own, as
        diffusers does when one scheduler is made from another's config.

    Raises:
        ConfigError: a class or a setting that is not read, or a value out of range.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"the scheduler's config is {shown(config)}; give settings by name, such as "
            "{prediction_type: epsilon}"
        )
    name = config.get(CLASS)
    given = {str(key): value for key, value in config.items() if not str(key).startswith("_")}
    family = _family(name, given)
    defaults = {} if name is None else _defaults(name)
    rules = family.rules
    for key, value in given.items():
        if key in rules:
            rules[key].check(key, value)
        elif key not in defaults or value != defaults[key]:
            raise ConfigError(
                f"the scheduler's {shown(key)}={shown(value)} is not known, and might change the "
                f"noise law; {did_you_mean(key, (*family.law, *family.steps))}; if it changes "
                f"nothing, leave it out, as by prior.scheduler={{{shown(key)}:null}}"
            )
    filled = {**defaults, **given}
    law = {key: filled[key] for key in family.law if key in filled}
    _check_law(law, name, defaults)
    unsaid = config.get(_UNSAID) or ()
    steps = {
        key: given[key]
        for key in family.steps
        # A pipeline may have changed what its scheduler's config did not say.
        if key in given and not (key in unsaid and given[key] == defaults.get(key, given[key]))
    }
    implied = {"prediction_type": FLOW} if family is FLOW_MATCHING else {}
    read = {**law, **steps, **implied}
    return {key: value for key, value in read.items() if value is not None}


def changed(config: Mapping[str, Any], changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """A scheduler's config with a user's settings in place of its own; None takes one out."""
    if changes is None:
        return dict(config)
    if not isinstance(changes, Mapping):
        raise ConfigError(
            f"prior.scheduler={shown(changes)} must have settings of the model's scheduler by "
            "name, such as {timestep_spacing:trailing}"
        )
    kept = {key: value for key, value in config.items() if key not in changes}
    kept[_UNSAID] = [key for key in config.get(_UNSAID) or () if key not in changes]
    return {**kept, **{key: value for key, value in changes.items() if value is not None}}


def _family(name: Any, given: Mapping[str, Any]) -> Family:
    if name is None:
        return FLOW_MATCHING if given.get("prediction_type") == FLOW else DIFFUSION
    for family in FAMILIES:
        if name in family.classes:
            return family
    import diffusers

    accepted = [each for family in FAMILIES for each in family.classes]
    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise ConfigError(f"unknown scheduler '{shown(name)}'; {did_you_mean(str(name), accepted)}")
    raise ConfigError(
        f"the noise law of the scheduler {name} is not read here; use a model with one of: "
        f"{', '.join(accepted)}"
    )


def _defaults(name: str) -> dict[str, Any]:
    """The parameters of a listed class, and their defaults."""
    import diffusers

    kind = getattr(diffusers, name)
    missing = [each for each in getattr(kind, "_backends", ()) if each != "torch"]
    if missing:  # diffusers has a class without parameters in its place
        raise ConfigError(
            f"the scheduler {name} needs a package that is not here: "
            f"pip install {' '.join(missing)}"
        )
    return {each.name: each.default for each in inspect.signature(kind).parameters.values()}


def _check_law(law: Mapping[str, Any], name: str | None, known: Mapping[str, Any]) -> None:
    """Refuse settings of the noise law that do not fit each other or the class."""
    if name in DIFFUSION.classes and law["prediction_type"] == FLOW:
        raise ConfigError(
            f"the scheduler {name} has prediction_type={FLOW}; a flow-matching model needs a "
            "FlowMatchEulerDiscreteScheduler"
        )
    rescale = "rescale_betas_zero_snr"
    if law.get(rescale) and name is not None and rescale not in known:
        raise ConfigError(
            f"the scheduler has {rescale}=True, which {name} does not know; set it to false, or "
            f"{CLASS} to DDIMScheduler, whichever the model was trained with"
        )
    betas, timesteps = law.get("trained_betas"), law.get("num_train_timesteps", 1000)
    if betas is not None and len(betas) != timesteps:
        raise ConfigError(
            f"the scheduler's trained_betas has {len(betas)} numbers; give one for each of "
            f"num_train_timesteps={timesteps}"
        )
