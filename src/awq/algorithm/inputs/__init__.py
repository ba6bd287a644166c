"""What linears read over the calibration text, block by block: in the float model, and behind quantized linears."""
