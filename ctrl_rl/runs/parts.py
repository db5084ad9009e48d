"""Parts of a run that are given as Python objects instead of names of yamls.

A part is a ready object, or what makes one: a class, a function, or `functools.partial` of these. A
reward may also be a plain function of (sample, control). See `ctrl_rl.runs.record` for what a
config can say of them.
"""

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ctrl_rl.agents.agent import Agent
from ctrl_rl.envs.control_laws import ControlLaw
from ctrl_rl.errors import ConfigError, RunError, one_line
from ctrl_rl.kernels import TransitionKernel
from ctrl_rl.kernels.levels import noise_levels
from ctrl_rl.policies import DenoisingPolicy
from ctrl_rl.priors import Prior
from ctrl_rl.rewards import FunctionReward, Reward

Maker = Callable[..., Any]  # makes a part from what the program adds
Makers = Mapping[str, Maker]  # by name of the part
NONE: Makers = {}

_KINDS: dict[str, type] = {
    "prior": Prior,
    "kernel": TransitionKernel,
    "reward": Reward,
    "control_law": ControlLaw,
    "policy": DenoisingPolicy,
    "agent": Agent,
}
_ARE_COPIED = ("policy", "agent")  # training changes them, and the user's object stays as it is
_HOW = {
    "prior": "a network becomes one by Prior(NetworkDenoiser(network, scheduler_config), "
    "scheduler_config, shape=(1, 8, 8)), a diffusers pipeline by its folder: prior='diffusers', "
    "overrides=['prior.path=…']",
    "kernel": "such as 'ddpm', or functools.partial(ctrl_rl.kernels.ddpm_kernel, num_steps=20)",
    "reward": "a function of (sample, control) that gives nats [B] is one too",
    "control_law": "such as 'balanced'",
    "policy": "such as 'drift', or a subclass of DenoisingPolicy",
    "agent": "such as 'ctrl', or a subclass of Agent",
}
GIVEN = "given"  # the config's key for labels of parts that it cannot build
FUNCTION = "ctrl_rl.rewards.FunctionReward"
_LEVEL_TOLERANCE = 1e-3


def check_kind(name: str, part: Any) -> None:
    """Refuse something else than a part of its kind.

    Raises:
        ConfigError: says what would have been one.
    """
    kind = _KINDS[name]
    if not isinstance(part, kind):
        raise ConfigError(f"{name}={label_of(part)} is no {kind.__name__}; {_HOW[name]}")


def check_part(name: str, part: Any) -> None:
    """Refuse, before anything is built, what neither is a part nor makes one.

    Raises:
        ConfigError: as `check_kind`, or a reward function of other arguments.
    """
    if is_function(name, part):
        try:
            inspect.signature(part).bind(None, None)
        except TypeError as error:
            raise ConfigError(
                f"reward={label_of(part)} must take (sample, control): {one_line(error)}; what "
                "makes a Reward is called first"
            ) from None
        except ValueError:
            pass  # a builtin does not say what it takes
    elif inspect.isclass(target_of(part)):
        if not issubclass(target_of(part), _KINDS[name]):
            check_kind(name, target_of(part))
    elif not is_maker(part):
        check_kind(name, part)


def is_function(name: str, part: Any) -> bool:
    """Whether a part is a reward function."""
    ready = isinstance(part, Reward) or inspect.isclass(target_of(part))
    return name == "reward" and callable(part) and not ready


def label_of(part: Any) -> str:
    """The name by which tables and messages call a part."""
    if isinstance(part, str):
        return repr(part)
    named = target_of(part)
    return str(getattr(named, "__name__", type(named).__name__)).strip("<>")


def makers(config: DictConfig, parts: Mapping[str, Any]) -> dict[str, Maker]:
    """What makes the given parts, for `ctrl_rl.runs.build`.

    Args:
        config: of the run; it has the settings of a reward function.
        parts: by name, of those that the config does not record or that replace what it does.

    Raises:
        ConfigError: something that makes no such part.
    """
    found: dict[str, Maker] = {}
    for name, part in parts.items():
        check_part(name, part)
        if is_function(name, part):
            node = config.reward
            if node.get("_target_") != FUNCTION:
                raise ConfigError(
                    f"reward={label_of(part)} is a function, and the run's is not; give a Reward"
                )
            settings = OmegaConf.to_container(
                OmegaConf.masked_copy(node, ["controls", "differentiable", "upper_bound"])
            )
            found[name] = partial(FunctionReward, function=part, **dict(settings))  # type: ignore[arg-type]
        elif is_maker(part):
            found[name] = partial(_made, part)
        else:
            found[name] = partial(_ready, part, copied=name in _ARE_COPIED)
    return found


def check_given(config: DictConfig, name: str, given: Makers) -> None:
    """Refuse a run whose config cannot build a part that nobody gave.

    Raises:
        RunError: names all that are missing, and the cure.
    """
    marked = config.get(GIVEN) or {}  # older runs do not have it
    if name not in marked:
        return
    load = [each for each in marked if each not in given and each != "agent"]
    missing = load or [name]
    named = " and ".join(f"{each} ({marked[each]})" for each in missing)
    again = ", ".join(f"{each}=…" for each in load)
    cure = f"give the same to load_run(path, {again}); " if load else ""
    raise RunError(
        f"{named} of this run was given in Python, and its config cannot build it; {cure}training "
        "goes on by the same call of ctrl_rl.train with resume=True"
    )


def check_kernel(prior: Prior, kernel: TransitionKernel) -> None:
    """Refuse a ready kernel of other noise levels than the prior's scheduler.

    Raises:
        ConfigError: it was made for another scheduler.
    """
    try:
        found = noise_levels(prior.scheduler_config)(kernel.timesteps.cpu())
    except IndexError:
        worst = float("inf")
    else:
        has = (kernel.signal.cpu(), kernel.noise.cpu())
        worst = max(float((a - b).abs().max()) for a, b in zip(found, has, strict=True))
    if not worst <= _LEVEL_TOLERANCE:
        raise ConfigError(
            "kernel has other noise levels than the prior's scheduler; make it with "
            "scheduler_config=prior.scheduler_config, or give what makes it: "
            "functools.partial(ctrl_rl.kernels.ddpm_kernel, num_steps=20)"
        )


def check_policy(policy: DenoisingPolicy, kernel: TransitionKernel) -> None:
    """Refuse a ready policy for other steps than the kernel's.

    Raises:
        ConfigError: its steps have other scales.
    """
    if not torch.equal(policy.kernel.scale.cpu(), kernel.scale.cpu()):
        raise ConfigError(
            "policy was made for another kernel than the run's; give the same to both, or give "
            "the policy's class, which then gets the run's"
        )


def target_of(part: Any) -> Any:
    """The class or function behind a partial; anything else is its own."""
    return part.func if isinstance(part, partial) else part


def is_maker(part: Any) -> bool:
    """Whether a part is a class or function, perhaps with arguments."""
    target = target_of(part)
    return inspect.isclass(target) or inspect.isroutine(target)


def _made(maker: Maker, /, **added: Any) -> Any:
    """Call with those of the program's arguments that it takes."""
    takes = inspect.signature(maker).parameters.values()
    if not any(each.kind is each.VAR_KEYWORD for each in takes):
        names = {each.name for each in takes}
        added = {key: value for key, value in added.items() if key in names}
    return maker(**added)


def _ready(part: Any, /, *, copied: bool, **added: Any) -> Any:
    del added  # it is complete
    return deepcopy(part) if copied else part
