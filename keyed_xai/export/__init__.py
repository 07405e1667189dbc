"""Logits and saliency maps as one ONNX graph: tracing, rules for gradients, precision and parity. No key comes here."""
