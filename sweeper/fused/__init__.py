"""Decoder layers of the Llama family computed by kernels of our own, over rows that lie without padding."""
