"""Exact resume: the training state of an adapter, as a dict and as files."""
