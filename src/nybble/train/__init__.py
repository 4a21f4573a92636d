"""The training loop and what surrounds it: checks before the first step, checkpoints, the record of a run."""
