"""Latency of one quantized linear by rows, beside cuBLAS, the read ceiling and other projects' kernels."""
