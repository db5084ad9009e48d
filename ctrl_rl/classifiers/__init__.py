"""Classifiers p(y | x): the reward of CTRL, and the independent judge of its samples."""
