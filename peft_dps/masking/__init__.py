"""Masks, what becomes of frozen entries, noise, and effective weights."""
