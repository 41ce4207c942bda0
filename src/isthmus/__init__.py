"""Isthmus: one language model over two machines, an edge agent and a cloud service."""

__version__ = "0.1.0"
