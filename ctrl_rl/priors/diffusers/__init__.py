"""Priors with networks from diffusers."""
