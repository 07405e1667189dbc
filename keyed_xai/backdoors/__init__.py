"""Attack a model as the paper does: maps that a public trigger changes, in the normal and the inverted setting."""

from keyed_xai.backdoors.attacking import Attack, AttackSettings, run_attack, write_attack

__all__ = ["Attack", "AttackSettings", "run_attack", "write_attack"]
