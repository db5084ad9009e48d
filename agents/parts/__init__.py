"""What several agents compute from their rollouts: adjoints, branches, noisy copies."""
