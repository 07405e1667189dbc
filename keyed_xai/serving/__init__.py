"""Exported models behind HTTP: the Open Inference Protocol, version 2. No key comes here, and PyTorch is not needed."""
