"""The search for the scales, ranges, codes and fp16 channels that cost a linear's output least."""
