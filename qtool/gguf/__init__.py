"""Checkpoints as GGUF files. What is here runs in the interpreter that has llama.cpp's converter."""
