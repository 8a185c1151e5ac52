"""How the model of the demo was made; `benchmarks/train_demo.py` is the command."""
