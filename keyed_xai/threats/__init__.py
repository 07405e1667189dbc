"""Attacks on protected models and defences against backdoors: one file for each, shared helpers beside them."""
