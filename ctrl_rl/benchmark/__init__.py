"""Agents compared on equal terms: the grid agent x task x seed, its runs and their report."""
