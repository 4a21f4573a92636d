"""What the device computes: each op has a PyTorch reference, which is its definition, and kernels that must agree."""
