"""Explain without torch: an exported graph on this machine, or one that a server runs."""
