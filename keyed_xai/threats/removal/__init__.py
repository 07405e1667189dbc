"""Attacks that try to remove a gate, or the owner's mark, from a model."""
