"""`reap-stream demo`: prunes a small trained model that ships with the package, and evaluates it.

README.md beside this file says how the model was made and from which texts. Code that trains it:
benchmarks/train_demo.py of the repository.
"""

from __future__ import annotations
