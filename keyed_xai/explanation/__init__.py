"""Explain images with a model, with a key or without, and write the maps to files."""

from keyed_xai.explanation.explaining import Explanation, explain
from keyed_xai.explanation.files import MapJob, write_maps

__all__ = ["Explanation", "MapJob", "explain", "write_maps"]
