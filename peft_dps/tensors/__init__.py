"""Tensors: layouts, scratch memory, files in place of memory, shards, states, bit differences."""
