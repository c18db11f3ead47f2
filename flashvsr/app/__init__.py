"""The upscaler in a browser: `desk` runs the jobs, `page` is what gradio shows of them."""
