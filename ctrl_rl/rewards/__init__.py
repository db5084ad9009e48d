"""Rewards: a clean sample and a control in, nats out."""

from ctrl_rl.rewards.classifier import ClassifierReward as ClassifierReward
from ctrl_rl.rewards.function import FunctionReward as FunctionReward
from ctrl_rl.rewards.jpeg import JpegSize as JpegSize
from ctrl_rl.rewards.linear import LinearReward as LinearReward
from ctrl_rl.rewards.mixture import MixtureClassifier as MixtureClassifier
from ctrl_rl.rewards.reward import Reward as Reward
