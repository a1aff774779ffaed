"""Benchmarks: what a training step costs in time and memory, beside plain fine-tuning of the same model."""
