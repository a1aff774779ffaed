"""Side-by-side comparison of fine-tuning methods, on the embedded task or on the user's own; `python -m` runs it."""
