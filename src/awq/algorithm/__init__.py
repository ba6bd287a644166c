"""Activation-aware weight quantization (Lin et al. 2023, arXiv 2306.00978) in pure torch.

No files, no kernels, no model names: structure is found by a probe forward and accepted by a numerical test.
"""
