"""Ready-made sweeps: every YAML file here runs as it stands and opens with its own command line; `data/` holds the
small datasets that they train on.
"""
