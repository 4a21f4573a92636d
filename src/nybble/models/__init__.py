"""Checkpoints in, models out: files, names, precision, loss, generation, saving."""
