"""Golden data: a rollout in plain NumPy that shares no code with the package, and its numbers."""
