"""The layer on CUDA, piece by piece as it comes."""
