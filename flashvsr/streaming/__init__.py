"""Streaming inference: the state of one stream, the upscaler around it, colours."""
