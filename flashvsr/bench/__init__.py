"""What `python -m flashvsr bench` measures: attention, modules, the pipeline, and the GPU campaign."""
