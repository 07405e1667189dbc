"""Ways round the gate: other explanations of the model than those protected."""
