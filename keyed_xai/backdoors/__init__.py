"""Attack a model as the paper does: maps that a public trigger changes, in the normal and the inverted setting."""

from typing import TYPE_CHECKING

from keyed_xai import load_on_use

if TYPE_CHECKING:
    from keyed_xai.backdoors.attacking import Attack, AttackSettings, run_attack, write_attack

__all__ = ["Attack", "AttackSettings", "run_attack", "write_attack"]

__getattr__, __dir__ = load_on_use(
    __name__,
    {
        "Attack": "keyed_xai.backdoors.attacking",
        "AttackSettings": "keyed_xai.backdoors.attacking",
        "run_attack": "keyed_xai.backdoors.attacking",
        "write_attack": "keyed_xai.backdoors.attacking",
    },
)
