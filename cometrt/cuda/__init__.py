"""The layer on CUDA."""
