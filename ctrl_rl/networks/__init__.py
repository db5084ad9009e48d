"""Networks that the project owns, and how networks of any kind run."""
