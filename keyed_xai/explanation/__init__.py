"""Explain images with a model, with a key or without, and write the maps to files."""

from typing import TYPE_CHECKING

from keyed_xai import load_on_use

if TYPE_CHECKING:
    from keyed_xai.explanation.explaining import Explanation, explain
    from keyed_xai.explanation.files import MapJob, write_maps

__all__ = ["Explanation", "MapJob", "explain", "write_maps"]

__getattr__, __dir__ = load_on_use(
    __name__,
    {
        "Explanation": "keyed_xai.explanation.explaining",
        "MapJob": "keyed_xai.explanation.files",
        "explain": "keyed_xai.explanation.explaining",
        "write_maps": "keyed_xai.explanation.files",
    },
)
