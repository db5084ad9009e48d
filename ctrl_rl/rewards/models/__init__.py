"""Rewards from third-party models."""
