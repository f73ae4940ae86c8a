"""From float weights to integers: a clipping ratio for each scale, then rounding to nearest or GPTQ."""
