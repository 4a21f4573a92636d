"""Quantized weights and the linear layers that hold them."""
