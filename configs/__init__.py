"""Hydra configs: a folder is a group, a yaml is a choice. See `ctrl-rl list`."""
