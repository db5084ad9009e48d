"""Which schedulers of diffusers are read, and what becomes of each of their settings.

A prior's noise law is its scheduler's: signal and noise at every timestep, and what the network
predicts there. Configs say it in the words of many classes, and most of these have settings of
their own. A class is read only if it is listed here, and so is a setting: what nobody has looked at
is refused by name, and never read as something else. `ctrl_rl.kernels.settings` does so.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ctrl_rl.errors import ConfigError, check_choice

FLOW = "flow_prediction"  # the prediction_type of a network that predicts e - clean
# Keys that a prior adds to a flow scheduler's config for what its pipeline's call passes: whether
# levels fall evenly from 1 to 1 / S, and the shift if it depends on the image's size.
UNIFORM, SHIFT = "uniform_sigmas", "mu"
_MOST_TIMESTEPS = 10_000  # published models have 1000 or 4000


def shown(value: object) -> str:
    """A value from anyone's file, of any type and size, on one short line."""
    return " ".join(str(value).split())[:60]


class Rule(ABC):
    """What a setting may be."""

    @abstractmethod
    def check(self, name: str, value: Any) -> None:
        """Raise `ConfigError` for a value, of any type, that is not accepted."""


@dataclass(frozen=True)
class Value(Rule):
    """A setting that is read.

    Attributes:
        wanted: what is accepted, in words.
        holds: whether a value is.
    """

    wanted: str
    holds: Callable[[Any], bool]

    def check(self, name: str, value: Any) -> None:
        """Raise `ConfigError` for a value that is not accepted."""
        if not self.holds(value):
            raise ConfigError(f"the scheduler's {name}={shown(value)} must be {self.wanted}")


@dataclass(frozen=True)
class Choice(Rule):
    """A setting that is read, one of several words."""

    names: tuple[str, ...]

    def check(self, name: str, value: Any) -> None:
        """Raise `ConfigError`, which names the nearest word."""
        check_choice(f"{name} of the scheduler", shown(value), self.names)


@dataclass(frozen=True)
class Unfollowed(Rule):
    """A setting of a sampler's steps that no kernel follows.

    Attributes:
        without: the values that leave it out, and the first of them in the words of a yaml.
    """

    without: tuple[Any, ...]
    plain: str

    def check(self, name: str, value: Any) -> None:
        """Raise `ConfigError`, which says how to go without it."""
        if value not in self.without:
            raise ConfigError(
                f"the scheduler's {name}={shown(value)} is followed by no kernel, so samples would "
                f"not be those of the model's own pipeline; to go without it, set {name} to "
                f"{self.plain}, in scheduler_config.json or by prior.scheduler="
                f"{{{name}:{self.plain}}}"
            )


@dataclass(frozen=True)
class AnotherLaw(Rule):
    """A setting that makes it a noise law that is not read.

    Attributes:
        without: the values that do not.
        instead: what to use.
    """

    without: tuple[Any, ...]
    instead: str

    def check(self, name: str, value: Any) -> None:
        """Raise `ConfigError`, which says what to use instead."""
        if value not in self.without:
            raise ConfigError(
                f"the scheduler's {name}={shown(value)} makes it a noise law that is not read "
                f"here; {self.instead}"
            )


@dataclass(frozen=True)
class Family:
    """Classes of schedulers whose noise law is read in the same way.

    Attributes:
        classes: their names in diffusers.
        law: settings of the noise law.
        steps: settings of the sampler's steps, which the kernels follow.
        rest: settings that are not read.
    """

    classes: tuple[str, ...]
    law: Mapping[str, Rule]
    steps: Mapping[str, Rule]
    rest: Mapping[str, Rule]

    @property
    def rules(self) -> dict[str, Rule]:
        """The rule of every setting."""
        return {**self.rest, **self.law, **self.steps}


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and (isinstance(value, int) or math.isfinite(value))


def _whole(low: int, high: int) -> Value:
    return Value(
        f"a whole number from {low} to {high}",
        lambda value: isinstance(value, int) and _is_number(value) and low <= value <= high,
    )


def _between(low: float, high: float) -> Value:
    return Value(
        f"a number between {low} and {high}", lambda value: _is_number(value) and low < value < high
    )


def _or_null(value_: Value) -> Value:
    return Value(f"{value_.wanted}, or null", lambda value: value is None or value_.holds(value))


def _are_betas(value: Any) -> bool:
    try:
        betas = torch.tensor(list(value), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return False
    return betas.ndim == 1 and bool(((betas > 0) & (betas < 1)).all())


_FLAG = Value("true or false", lambda value: isinstance(value, bool))
_NUMBER = Value("a finite number", _is_number)
_POSITIVE = Value("a number above 0", lambda value: _is_number(value) and value > 0)
_QUANTILE = Value("a number above 0, up to 1", lambda value: _is_number(value) and 0 < value <= 1)
_BETAS = Value("a list of numbers between 0 and 1", _are_betas)
_WORD = Value("a word", lambda value: isinstance(value, str))
_TIMESTEPS = _whole(2, _MOST_TIMESTEPS)
_LENGTH = _whole(1, 2**31)
# It changes neither the law nor the timesteps: a setting of the solver, which a kernel replaces.
_INERT = Value("anything", lambda value: True)
_OFF = (False, None)  # of a flag
_NO_FLAG = Unfollowed(_OFF, "false")
_NO_NUMBER = Unfollowed((None, -math.inf), "null")

DIFFUSION = Family(
    classes=(
        *("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler"),
        *("PNDMScheduler", "LMSDiscreteScheduler"),
        *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
        *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
        *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler"),
        *("DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler"),
    ),
    law={
        "num_train_timesteps": _TIMESTEPS,
        "beta_start": _between(0, 1),
        "beta_end": _between(0, 1),
        "beta_schedule": Choice(
            ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
        ),
        "trained_betas": _or_null(_BETAS),
        "prediction_type": Choice(("epsilon", "v_prediction", "sample", FLOW)),
        "rescale_betas_zero_snr": _FLAG,
    },
    steps={
        "timestep_spacing": Choice(("leading", "trailing", "linspace")),
        "steps_offset": _whole(0, _MOST_TIMESTEPS),
        "set_alpha_to_one": _FLAG,
        "clip_sample": _FLAG,
        "clip_sample_range": _POSITIVE,
        "thresholding": _FLAG,
        "dynamic_thresholding_ratio": _QUANTILE,
        "sample_max_value": _POSITIVE,
        "variance_type": _or_null(_WORD),
    },
    rest={
        **dict.fromkeys(("solver_type", "solver_order", "solver_p", "algorithm_type"), _INERT),
        **dict.fromkeys(("predictor_order", "corrector_order", "disable_corrector"), _INERT),
        **dict.fromkeys(("predict_x0", "lower_order_final", "euler_at_final"), _INERT),
        **dict.fromkeys(("skip_prk_steps", "tau_func", "noise_sampler_seed"), _INERT),
        "tensor_format": _INERT,  # of diffusers' first releases
        # These four are read together with use_flow_sigmas, and not by themselves.
        **dict.fromkeys(("flow_shift", "use_dynamic_shifting", "time_shift_type"), _INERT),
        "shift_terminal": _INERT,
        "use_flow_sigmas": AnotherLaw(
            _OFF, "a flow-matching model needs a FlowMatchEulerDiscreteScheduler"
        ),
        "timestep_type": AnotherLaw(("discrete",), "give a model with timestep_type=discrete"),
        "snr_shift_scale": AnotherLaw((1, None), "give a model with snr_shift_scale=1"),
        "predict_epsilon": AnotherLaw((True, None), "say prediction_type=sample in its place"),
        "use_karras_sigmas": _NO_FLAG,
        "use_exponential_sigmas": _NO_FLAG,
        "use_beta_sigmas": _NO_FLAG,
        "use_lu_lambdas": _NO_FLAG,
        "sigma_min": _NO_NUMBER,  # both are the ends of these spacings
        "sigma_max": _NO_NUMBER,
        "lambda_min_clipped": _NO_NUMBER,
        "interpolation_type": Unfollowed(("linear",), "linear"),
        "final_sigmas_type": Unfollowed(("zero",), "zero"),
    },
)
FLOW_MATCHING = Family(
    classes=("FlowMatchEulerDiscreteScheduler",),
    law={"num_train_timesteps": _TIMESTEPS, "prediction_type": Choice((FLOW,))},
    steps={
        "shift": _POSITIVE,
        "use_dynamic_shifting": _FLAG,
        "base_shift": _NUMBER,
        "max_shift": _NUMBER,
        "base_image_seq_len": _LENGTH,
        "max_image_seq_len": _LENGTH,
        "shift_terminal": _or_null(_between(0, 1)),
        "time_shift_type": Choice(("exponential", "linear")),
        "use_karras_sigmas": _FLAG,
        "use_exponential_sigmas": _FLAG,
        "use_beta_sigmas": _FLAG,
        UNIFORM: _FLAG,
        SHIFT: _or_null(_NUMBER),
    },
    rest={
        **dict.fromkeys((*DIFFUSION.law, *DIFFUSION.steps), _INERT),  # which say nothing here
        "stochastic_sampling": _NO_FLAG,
        "clip_sample": _NO_FLAG,
        "thresholding": _NO_FLAG,
        "invert_sigmas": AnotherLaw(_OFF, "give a model with invert_sigmas=false"),
    },
)
FAMILIES = (DIFFUSION, FLOW_MATCHING)
