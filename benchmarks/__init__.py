"""The project's figures and the paper's tables: one module per subject, one cell per file on disk."""
