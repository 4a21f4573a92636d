"""Several ways to train one model on the same data, measured side by side."""
