"""Which scheduler configs are read: a noise law equal to the class's own, or a refusal by name."""

import inspect
import math
from typing import Any

import diffusers
import pytest
import torch

from ctrl_rl.errors import ConfigError
from ctrl_rl.kernels import ddim_kernel, ddpm_kernel, flow_sde_kernel
from ctrl_rl.kernels.accepted import DIFFUSION, FAMILIES, FLOW, FLOW_MATCHING
from ctrl_rl.kernels.levels import noise_levels
from ctrl_rl.kernels.settings import changed, scheduler_settings

Config = dict[str, Any]
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")


def installed() -> dict[str, Any]:
    """Every scheduler class of diffusers by name, without the ones that lack a package."""
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if "Scheduler" in name}
    kinds = {name: kind for name, kind in found.items() if inspect.isclass(kind)}
    base = diffusers.SchedulerMixin
    return {n: kind for n, kind in kinds.items() if issubclass(kind, base) and kind is not base}


ACCEPTED = [name for family in FAMILIES for name in family.classes]
HERE = sorted(set(DIFFUSION.classes) & set(installed()))
REFUSED = sorted(set(installed()) - set(ACCEPTED))
LAWS: list[Config] = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.001, "num_train_timesteps": 300},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 200},
    {"num_train_timesteps": 50, "trained_betas": [0.001 + 0.002 * i for i in range(50)]},
    {"rescale_betas_zero_snr": True, "num_train_timesteps": 500},
]


def parameters(kind: Any) -> Config:
    return {each.name: each.default for each in inspect.signature(kind).parameters.values()}


def config_of(kind: Any, law: Config) -> Config:
    """What a scheduler's file has that says only these settings; the others are the class's own."""
    return {"_class_name": kind.__name__, **law}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: "-".join(law) or "defaults")
@pytest.mark.parametrize("name", HERE)
def test_noise_law_is_the_classs_own(name: str, law: Config) -> None:
    kind = getattr(diffusers, name)
    if "rescale_betas_zero_snr" in law and "rescale_betas_zero_snr" not in parameters(kind):
        with pytest.raises(ConfigError, match=f"which {name} does not know"):
            noise_levels(config_of(kind, law))
        return
    scheduler = kind(**law)
    every = torch.arange(scheduler.config.num_train_timesteps)
    for config in (config_of(kind, law), {"_class_name": name, **scheduler.config}):
        signal, noise = noise_levels(config)(every)
        # Some have 2^-24 where a rescaled signal is 0, so that sigma is finite.
        atol = 1.1 * 2**-24 if "rescale_betas_zero_snr" in law else 0.0
        torch.testing.assert_close(signal.square(), scheduler.alphas_cumprod, rtol=1e-6, atol=atol)
        torch.testing.assert_close(signal.square() + noise.square(), torch.ones(len(every)))
    settings = scheduler_settings(config_of(kind, law))
    assert settings["prediction_type"] == "epsilon"


@pytest.mark.parametrize("name", HERE)
def test_sigmas_are_the_classs_own(name: str) -> None:
    kind = getattr(diffusers, name)
    scheduler = kind.from_config({**LAWS[1], "timestep_spacing": "linspace"})
    scheduler.set_timesteps(7)
    if not hasattr(scheduler, "sigmas"):
        return
    levels = noise_levels(config_of(kind, LAWS[1]))
    signal, noise = levels(scheduler.timesteps.float())
    sigmas = scheduler.sigmas[: len(scheduler.timesteps)].float()
    whole = slice(None, None, scheduler.order)  # the others are of its solver, between two steps
    torch.testing.assert_close((noise / signal)[whole], sigmas[whole], rtol=1e-3, atol=1e-3)


def test_flow_levels_are_the_classs_own() -> None:
    kind = diffusers.FlowMatchEulerDiscreteScheduler
    for steps in (
        {"shift": 3.0},
        {"use_dynamic_shifting": True, "mu": 0.9},
        {"use_dynamic_shifting": True, "mu": 0.9, "time_shift_type": "linear"},
        {"shift_terminal": 0.1},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
    ):
        config = config_of(kind, steps)
        mu = config.pop("mu", None)
        scheduler = kind.from_config(config)
        scheduler.set_timesteps(7, mu=mu)
        given = config if mu is None else {**config, "mu": mu}
        kernel = flow_sde_kernel(scheduler_config=given, num_steps=6)
        torch.testing.assert_close(kernel.timesteps, scheduler.timesteps)
        torch.testing.assert_close(kernel.noise, scheduler.sigmas[:-1])
        signal, noise = noise_levels(given)(scheduler.timesteps)
        torch.testing.assert_close(noise, scheduler.sigmas[:-1])
        torch.testing.assert_close(signal, 1 - scheduler.sigmas[:-1])


@pytest.mark.parametrize("name", REFUSED)
def test_every_other_class_is_refused_by_name(name: str) -> None:
    """A class that a newer diffusers adds is among these until someone has looked at it."""
    for config in ({"_class_name": name}, {**parameters(installed()[name]), "_class_name": name}):
        for read in (noise_levels, lambda c: ddim_kernel(scheduler_config=c, num_steps=4)):
            with pytest.raises(ConfigError, match=f"scheduler {name} is not read .*DDPMScheduler"):
                read(config)


def test_the_classes_of_the_issue_are_among_the_refused() -> None:
    assert {
        *("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler"),
        *("FlowMatchHeunDiscreteScheduler", "LCMScheduler", "TCDScheduler", "KarrasVeScheduler"),
        *("ScoreSdeVeScheduler", "UnCLIPScheduler", "IPNDMScheduler", "CogVideoXDDIMScheduler"),
    } <= set(REFUSED)


@pytest.mark.parametrize("name", [name for name in ACCEPTED if name in installed()])
def test_every_parameter_of_an_accepted_class_has_been_looked_at(name: str) -> None:
    family = DIFFUSION if name in DIFFUSION.classes else FLOW_MATCHING
    given = parameters(installed()[name])
    assert set(given) <= set(family.rules)
    scheduler_settings({**given, "_class_name": name})  # and its default is one that is read
    for key, value in scheduler_settings({"_class_name": name}).items():
        assert value == given.get(key, FLOW), key


_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SD |= {"num_train_timesteps": 1000, "steps_offset": 1, "trained_betas": None}
_SD |= {"set_alpha_to_one": False, "skip_prk_steps": True, "clip_sample": False}
PUBLISHED: dict[str, Config] = {
    "Stable Diffusion 1.5": {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **_SD},
    "Stable Diffusion 2.1": {"_class_name": "DDIMScheduler", **_SD, "prediction_type": "epsilon"},
    "SDXL": {
        **{"_class_name": "EulerDiscreteScheduler", **_SD, "interpolation_type": "linear"},
        **{"sample_max_value": 1.0, "timestep_spacing": "leading", "use_karras_sigmas": False},
    },
    "a DPM solver": {
        **{"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++"},
        **{"lambda_min_clipped": -math.inf, "use_lu_lambdas": False, "variance_type": None},
        **{"euler_at_final": False, "lower_order_final": True, "solver_order": 2},
    },
    "google/ddpm": {
        **{"_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "clip_sample": True},
        **{"beta_schedule": "linear", "trained_betas": None, "variance_type": "fixed_large"},
    },
    "Flux": {
        **{"_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256},
        **{"base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15, "shift": 3.0},
        **{"num_train_timesteps": 1000, "use_dynamic_shifting": True},
    },
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_configs_are_read(model: str) -> None:
    config = PUBLISHED[model]
    settings = scheduler_settings(config)
    assert {key: config.get(key, settings[key]) for key in settings} == settings
    assert settings["num_train_timesteps"] == 1000
    assert scheduler_settings(settings) == settings  # read again, it is the same


UNREAD: list[tuple[str, Config, str]] = [
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "{use_karras_sigmas:false}"),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}, "{use_exponential_sigmas:false}"),
    ("HeunDiscreteScheduler", {"use_beta_sigmas": True}, "{use_beta_sigmas:false}"),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, "{use_lu_lambdas:false}"),
    ("EulerDiscreteScheduler", {"sigma_min": 0.002}, "{sigma_min:null}"),
    ("UniPCMultistepScheduler", {"sigma_max": 80.0}, "{sigma_max:null}"),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "{interpolation_type:linear}"),
    ("DPMSolverSinglestepScheduler", {"final_sigmas_type": "sigma_min"}, "{final_sigmas_type:zero"),
    ("SASolverScheduler", {"lambda_min_clipped": -5.1}, "{lambda_min_clipped:null}"),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type=discrete"),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "needs a FlowMatchEuler"),
    ("DEISMultistepScheduler", {"prediction_type": FLOW}, "needs a FlowMatchEuler"),
    ("DDIMScheduler", {"snr_shift_scale": 3.0}, "snr_shift_scale=1"),
    ("DDPMScheduler", {"predict_epsilon": False}, "prediction_type=sample"),
    ("DDPMScheduler", {"warp": 3.0}, "warp=3.0 is not known"),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas=false"),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "{stochastic_sampling:fals"),
    ("FlowMatchEulerDiscreteScheduler", {"warp": 3.0}, "warp=3.0 is not known"),
]


@pytest.mark.parametrize(("name", "setting", "fix"), UNREAD, ids=[str(case[1]) for case in UNREAD])
def test_settings_that_are_not_read_are_refused_with_what_to_do(
    name: str, setting: Config, fix: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        noise_levels({"_class_name": name, **setting})
    told = str(raised.value)
    assert next(iter(setting)) in told and fix in told and "\n" not in told


def test_a_setting_of_a_newer_diffusers_is_read_at_its_default_alone(monkeypatch: Any) -> None:
    class Newer(diffusers.DDPMScheduler):
        def __init__(self, beta_end: float = 0.02, warp: float = 1.0) -> None: ...

    monkeypatch.setattr(diffusers, "DDPMScheduler", Newer)
    config = {"_class_name": "DDPMScheduler", "prediction_type": "sample"}
    assert scheduler_settings({**config, "warp": 1.0})["beta_end"] == 0.02
    with pytest.raises(ConfigError, match="warp=2.0 is not known"):
        scheduler_settings({**config, "warp": 2.0})


def test_settings_without_a_class_are_checked_too() -> None:
    config = {"beta_schedule": "linear", "prediction_type": "sample", "clip_sample": False}
    assert scheduler_settings(config) == config
    with pytest.raises(ConfigError, match="beta_shedule=linear is not known.*'beta_schedule'"):
        scheduler_settings({"beta_shedule": "linear"})


BAD: list[tuple[Any, str]] = [
    ({"num_train_timesteps": 10**12}, "must be a whole number from 2 to 10000"),
    ({"num_train_timesteps": 10**400}, "must be a whole number"),
    ({"num_train_timesteps": math.nan}, "must be a whole number"),
    ({"num_train_timesteps": True}, "must be a whole number"),
    ({"num_train_timesteps": None}, "must be a whole number"),
    ({"num_train_timesteps": 10**12, "_class_name": "FlowMatchEulerDiscreteScheduler"}, "a whole"),
    ({"beta_start": -0.1}, "beta_start=-0.1 must be a number between 0 and 1"),
    ({"beta_end": 2}, "beta_end=2 must be a number between 0 and 1"),
    ({"beta_end": math.nan}, "beta_end=nan must be a number between 0 and 1"),
    ({"beta_start": "0.1\nx"}, "beta_start=0.1 x must be a number"),
    ({"beta_schedule": "cosine"}, "unknown beta_schedule of the scheduler 'cosine'"),
    ({"prediction_type": ["epsilon"]}, "unknown prediction_type"),
    ({"trained_betas": [0.1, 0.2]}, "has 2 numbers; give one for each of num_train_timesteps=1000"),
    ({"trained_betas": [0.1, 1.5]}, "trained_betas=.* must be a list of numbers between 0 and 1"),
    ({"trained_betas": "betas"}, "trained_betas=betas must be"),
    ({"beta_start": 0.5, "beta_end": 0.9}, "signal does not fall at timestep"),
    ({"beta_start": 1e-9, "beta_end": 1e-9}, "does not fall at timestep 0 .* larger ones"),
    ({"clip_sample": "false"}, "clip_sample=false must be true or false"),
    ({"steps_offset": -1}, "steps_offset=-1 must be a whole number"),
    ({"timestep_spacing": "leadin"}, "did you mean 'leading'"),
    ({"_class_name": "DDPMSheduler"}, "unknown scheduler.*did you mean 'DDPMScheduler'"),
    ({"_class_name": 5}, "unknown scheduler '5'"),
    ({"_class_name": ["DDPMScheduler"]}, "unknown scheduler"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0.0}, "must be a number above 0"),
    ("linear", "the scheduler's config is linear; give settings by name"),
]


@pytest.mark.parametrize(("config", "reason"), BAD, ids=[str(case[0])[:50] for case in BAD])
def test_values_out_of_range_are_refused_in_one_line(config: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as raised:
        noise_levels(config)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ({"use_dynamic_shifting": True}, "needs mu, the shift"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "Only one of"),
    ],
)
def test_flow_timesteps_that_cannot_be_had_are_refused(steps: Config, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        flow_sde_kernel(scheduler_config={"prediction_type": FLOW, **steps}, num_steps=3)


def test_a_scheduler_that_lacks_a_package_says_which() -> None:
    name = "DPMSolverSDEScheduler"
    assert name in DIFFUSION.classes
    if name in HERE:
        pytest.skip("torchsde is here")
    with pytest.raises(ConfigError, match="pip install torchsde"):
        noise_levels({"_class_name": name})


def test_null_and_unsaid_steps_are_the_kernels_own() -> None:
    # A DPM solver's file has variance_type null; DDPM's kernel has a default of its own.
    config = {"_class_name": "DPMSolverMultistepScheduler", "variance_type": None}
    kernel = ddpm_kernel(scheduler_config=config, num_steps=3)
    expected = ddpm_kernel(scheduler_config={}, num_steps=3)
    assert torch.equal(kernel.scale, expected.scale)
    scheduler = diffusers.EulerDiscreteScheduler()  # whose own spacing is linspace
    named = {**scheduler.config, "_class_name": "EulerDiscreteScheduler"}
    assert "timestep_spacing" not in scheduler_settings(named)
    said = changed(named, {"timestep_spacing": "linspace", "beta_end": None})
    assert scheduler_settings(said)["timestep_spacing"] == "linspace"
    assert scheduler_settings(said)["beta_end"] == 0.02  # the class's own
