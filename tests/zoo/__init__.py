"""A tiny random model of every kind of decoder that transformers has, quantized and judged without qtool's help."""
