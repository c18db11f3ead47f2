"""The model: transformer, projector, VAE, TC decoder. Nothing here knows of distribution or globals."""
