"""Engines: how a role's module is run, differentiated and stepped on one process or several."""
