"""What `--mtp score` is for: drafts of the pruned prediction layer that the model accepts.

The three heads stand beside the same pruned decoder and have the same number of experts; they
differ in which these are.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.engine import prune_to, read_kept
from tests.mtp_oracle import load_head, prune_head
from tests.mtp_training import ALIVE, EXPERTS, TOPICS, Text, acceptance, train

MARGIN = 0.05
DRAWS = 8


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_its_own_scores_keep_more_drafts_than_others_choices(seed, tmp_path):
    text, rng = Text(seed), np.random.default_rng(seed + 100)
    source = train(tmp_path, text, seed)
    np.save(tmp_path / "calibration.npy", text.rows(64, range(TOPICS), rng))
    held_out = torch.from_numpy(text.rows(400, range(TOPICS), rng))
    main, head = load_head(source)
    whole = acceptance(main, head, held_out)
    accepted, kept = {}, {}
    for mtp in ("score", "match"):
        spec = (str(tmp_path / "calibration.npy"),)
        output = prune_to(tmp_path / mtp, source, spec, ALIVE, mtp=mtp)
        pruned_main, pruned_head = load_head(output)
        accepted[mtp] = acceptance(pruned_main, pruned_head, held_out)
        kept[mtp] = read_kept(output)
    assert kept["score"][0] == kept["match"][0]
    random = []
    for draw in range(DRAWS):
        chosen = np.random.default_rng(draw).choice(EXPERTS, ALIVE, replace=False)
        by_chance = prune_head(head, pruned_head, {1: sorted(chosen.tolist())}, 1)
        random.append(acceptance(pruned_main, by_chance, held_out))
    assert whole > 0.9
    assert accepted["score"] > whole - 0.01
    assert accepted["score"] > accepted["match"] + MARGIN
    assert accepted["score"] > np.mean(random) + MARGIN
    assert accepted["score"] >= max(random)
