"""CUDA kernels: compiling, loading and launching what lies in kernels_cu/."""
