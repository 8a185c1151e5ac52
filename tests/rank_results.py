"""What a job of several ranks must have in common with one process, and what it may not."""

from __future__ import annotations

import numpy as np
from safetensors.numpy import load_file

from tests.resuming import contents

RTOL = 1e-12
# What several ranks cannot repeat: the last bits of sums, and facts of the run.
OF_THE_RUN = {"run.json", "scores.safetensors"}


def decided(output):
    """Every file that must not depend on who did the job."""
    return {path: data for path, data in contents(output).items() if path.name not in OF_THE_RUN}


def assert_same_scores(found, expected):
    mine, theirs = load_file(found), load_file(expected)
    assert mine.keys() == theirs.keys()
    for name, array in theirs.items():
        if array.dtype == np.int64:
            np.testing.assert_array_equal(mine[name], array, err_msg=name)
        else:
            np.testing.assert_allclose(mine[name], array, rtol=RTOL, err_msg=name)
