"""Floor 3: the edge agent. Never imports torch, transformers or isthmus.cloud."""
