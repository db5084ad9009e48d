"""Priors whose networks are those of diffusers."""
