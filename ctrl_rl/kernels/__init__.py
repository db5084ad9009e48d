"""Transition kernels: the Gaussian steps of a diffusers scheduler as float32 tables."""

from ctrl_rl.kernels.flow import flow_sde_kernel as flow_sde_kernel
from ctrl_rl.kernels.kernel import TransitionKernel as TransitionKernel
from ctrl_rl.kernels.schedulers import ddim_kernel as ddim_kernel
from ctrl_rl.kernels.schedulers import ddpm_kernel as ddpm_kernel
from ctrl_rl.kernels.schedulers import euler_ancestral_kernel as euler_ancestral_kernel
