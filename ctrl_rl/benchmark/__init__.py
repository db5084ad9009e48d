"""Agents compared on equal terms: the grid agent x task x seed, its runs, and a report of them."""
