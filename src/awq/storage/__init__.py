"""Between a quantized model and its checkpoint, both ways: which tensors, under which names, on which devices."""
