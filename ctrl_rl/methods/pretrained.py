"""The pretrained model itself: what any control has to beat."""

from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.evaluation.samplers import PolicySampler
from ctrl_rl.policies import PriorPolicy


def prior(*, process: DenoisingProcess) -> PolicySampler:
    """Draw as the pretrained model does, ignoring the controls; its gap is log Z - E[r]."""
    return PolicySampler(process, PriorPolicy(process.kernel))
