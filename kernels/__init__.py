"""Hand-written training kernels: C, compiled on first use for the machine at hand, and CUDA."""
