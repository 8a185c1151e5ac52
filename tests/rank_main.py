"""`reap-stream` as torchrun starts it, with one rank killed at a step: RANK STEP ARGUMENTS."""

from __future__ import annotations

import os
import sys

import torch

from reap_stream.cli import main
from tests.killing import _arm

if __name__ == "__main__":
    torch.set_num_threads(1)
    _, rank, step, *arguments = sys.argv
    if os.environ["RANK"] == rank:
        _arm(int(step), 9)
    sys.exit(main(arguments))
