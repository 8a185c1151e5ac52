"""What pruning costs on the demo's model, seven questions; `benchmarks/quality/run.py` is the command."""
