"""Evaluation of policies: estimators of the optimality gap with honest intervals."""
