"""Host memory beside a device's: pinned pools, streams of weights and activations, pages of optimizer state."""
