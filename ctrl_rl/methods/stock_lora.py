r"""A LoRA that was trained elsewhere, for a stock diffusers pipeline, measured against its base.

With the adapters on, the network's clean estimate gives the policy's mean of every step; off, the
prior's. Both are Gaussians with the kernel's scale, so the path KL has its closed form, and the gap
of DDPO's, AlignProp's or anybody's LoRA is measured like that of any policy, under the task's
reward, with the prior's guidance, prompts and sampler. A last step without noise, which some
samplers have, is no action: the base model does it, where a stock pipeline has the adapters on.
"""

from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.evaluation.samplers import PolicySampler
from ctrl_rl.policies.stock_lora import StockLoraPolicy


def lora(*, process: DenoisingProcess, path: str) -> PolicySampler:
    """Draw with a LoRA on the prior.

    Args:
        process: the MDP, its prior a text-to-image pipeline.
        path: a file of safetensors, or the folder with pytorch_lora_weights.safetensors.

    Raises:
        ConfigError: as `StockLoraPolicy`.
    """
    policy = StockLoraPolicy(prior=process.prior, kernel=process.kernel, path=path)
    return PolicySampler(process, policy)
