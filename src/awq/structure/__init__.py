"""What a model is made of: its blocks, their linears however they are written, and which of these share an input.

Pure torch, and no model names: structure is found by a probe forward and accepted by a numerical test.
"""
