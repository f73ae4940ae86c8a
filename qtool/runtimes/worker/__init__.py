"""What runs in a runtime's own interpreter: a module per way of generating, and what they have in common."""
