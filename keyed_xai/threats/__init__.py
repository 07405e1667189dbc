"""Attacks on protected models and defences against backdoors, one file for each; `keyed_xai.auditing` runs them."""
