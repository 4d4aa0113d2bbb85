"""The tuner: finds the fastest TileConfig of a layer on this machine, and caches it."""
