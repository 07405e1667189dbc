"""Attacks on the key: finding, recovering and nearly guessing a trigger, and what channels do to one."""
