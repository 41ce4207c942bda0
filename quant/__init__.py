"""Floor 1: weight schemes, GGUF block import, error measures. Pure numpy."""
