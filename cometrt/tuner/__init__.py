"""Which TileConfig is fastest for a shape on a machine: found by trials, kept in a cache."""
