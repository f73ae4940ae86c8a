"""What takes several of qtool's services together: a quantization with its calibration, and a whole recipe."""
