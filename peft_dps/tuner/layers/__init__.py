"""DPS layers, one file a kind."""
