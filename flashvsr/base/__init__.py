"""What all packages share; nothing here knows a model."""
