"""Priors: the frozen pretrained denoiser, its scheduler config and its decoder."""

from ctrl_rl.priors.analytic import GaussianDenoiser as GaussianDenoiser
from ctrl_rl.priors.analytic import MixtureDenoiser as MixtureDenoiser
from ctrl_rl.priors.analytic import gaussian_prior as gaussian_prior
from ctrl_rl.priors.analytic import mixture_prior as mixture_prior
from ctrl_rl.priors.diffusers.unet import diffusers_unet_prior as diffusers_unet_prior
from ctrl_rl.priors.pipelines import diffusers_prior as diffusers_prior
from ctrl_rl.priors.prior import Denoiser as Denoiser
from ctrl_rl.priors.prior import NetworkDenoiser as NetworkDenoiser
from ctrl_rl.priors.prior import Prior as Prior
from ctrl_rl.priors.prior import Prompts as Prompts
