"""What several agents compute of their rollouts: adjoints, branches, noisy copies."""
