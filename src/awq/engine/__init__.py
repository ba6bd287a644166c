"""Generation on one device: static cache, the decode step as a CUDA graph, tokens chosen where the logits are."""
