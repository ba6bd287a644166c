"""Tier 2: a decode step of fused kernels for decoders of the common kind, built from structure that is discovered."""
