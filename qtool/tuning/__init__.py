"""What each linear layer's quantization costs the model, and a recipe that spends bytes where they help most."""
