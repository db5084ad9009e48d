"""Methods that need no training: samplers of a process, made by a yaml of `configs/method`.

A method is a function or class that takes the process and its own settings and gives a
`ctrl_rl.evaluation.samplers.Sampler`: a policy without parameters, or a law.
"""

from ctrl_rl.methods.pretrained import prior
from ctrl_rl.methods.reconstruction import ReconstructionGuidance, reconstruction_guidance
from ctrl_rl.methods.rejection import Rejection
from ctrl_rl.methods.stock_lora import lora

__all__ = ["ReconstructionGuidance", "Rejection", "lora", "prior", "reconstruction_guidance"]
