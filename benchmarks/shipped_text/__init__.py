"""What `make_builtin.py` puts into the package: documents and conversations, from a seed."""
