"""Models out: merged checkpoints, 4-bit checkpoints."""
