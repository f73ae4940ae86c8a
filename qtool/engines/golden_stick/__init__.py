"""The Golden Stick engine: mindspore-gs 1.4.1, in an interpreter of its own."""
