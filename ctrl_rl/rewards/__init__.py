"""Rewards: a clean sample and its condition in, nats out."""

from ctrl_rl.rewards.classifier import ClassifierReward as ClassifierReward
from ctrl_rl.rewards.function import FunctionReward as FunctionReward
from ctrl_rl.rewards.graded import Graded as Graded
from ctrl_rl.rewards.graded import Measure as Measure
from ctrl_rl.rewards.jpeg import Compressibility as Compressibility
from ctrl_rl.rewards.linear import LinearReward as LinearReward
from ctrl_rl.rewards.mean_shift import MeanShift as MeanShift
from ctrl_rl.rewards.mixture import MixtureClassifier as MixtureClassifier
from ctrl_rl.rewards.models.image_reward import ImageReward as ImageReward
from ctrl_rl.rewards.models.pretrained import AestheticScore as AestheticScore
from ctrl_rl.rewards.models.pretrained import ClipScore as ClipScore
from ctrl_rl.rewards.models.pretrained import ImageClassifier as ImageClassifier
from ctrl_rl.rewards.models.pretrained import TextClassifier as TextClassifier
from ctrl_rl.rewards.models.prompt_score import PackagedScore as PackagedScore
from ctrl_rl.rewards.models.prompt_score import PromptReward as PromptReward
from ctrl_rl.rewards.models.prompt_score import PromptScore as PromptScore
from ctrl_rl.rewards.reward import Reward as Reward
from ctrl_rl.rewards.weighted_sum import WeightedSum as WeightedSum
