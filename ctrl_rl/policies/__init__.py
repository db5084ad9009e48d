"""Policies: which Gaussian follows a latent, and how to draw from it."""

from ctrl_rl.policies.drift import DriftPolicy as DriftPolicy
from ctrl_rl.policies.fine_tuned import FineTunedPolicy as FineTunedPolicy
from ctrl_rl.policies.low_rank import AdaptedDenoiser as AdaptedDenoiser
from ctrl_rl.policies.low_rank import LowRankPolicy as LowRankPolicy
from ctrl_rl.policies.policy import DenoisingPolicy as DenoisingPolicy
from ctrl_rl.policies.policy import PriorPolicy as PriorPolicy
from ctrl_rl.policies.policy import StrengthPolicy as StrengthPolicy
from ctrl_rl.policies.reward_guided import RewardGuidedPolicy as RewardGuidedPolicy
from ctrl_rl.policies.side_image import SideImagePolicy as SideImagePolicy
from ctrl_rl.policies.side_network import SideNetworkPolicy as SideNetworkPolicy
