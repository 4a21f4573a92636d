"""The body of a Llama-like model as few large regions over fused kernels, beside the stock modules that hold it."""
