"""Model folders: recognising, loading, mapping names, exporting."""
