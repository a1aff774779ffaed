"""Compact storage: parameters for the selected units alone, beside a base layer that is never written."""
