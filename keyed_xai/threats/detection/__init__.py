"""Defences: is a model backdoored, or an input triggered? With the positive controls that they are known to catch."""
