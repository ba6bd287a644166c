"""Activation-aware weight quantization (Lin et al. 2023, arXiv 2306.00978) in pure torch.

No files, no kernels, no model names: what a model is made of is found in `awq.structure`.
"""
