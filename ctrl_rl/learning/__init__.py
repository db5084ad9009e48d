"""Training: one update, the loop around it, the optimizer, past episodes, checks, pretraining."""
