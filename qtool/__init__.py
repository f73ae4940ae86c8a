"""qtool: a language model from a hub to a W8A8 checkpoint to generated text."""

__version__ = "0.1.0"
