"""Rewards by models of other people."""
