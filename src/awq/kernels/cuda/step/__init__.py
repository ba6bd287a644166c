"""The kernels of a fused decode step of one token, each as a `Launch` made once.

The order of a step is embed, then layer by layer project, attention, accumulate, gated, accumulate, and at last head.
Each is launched to start before the one ahead of it has ended: see `Launch`.
"""
