"""What `python -m flashvsr COMMAND` runs, one file per command."""
