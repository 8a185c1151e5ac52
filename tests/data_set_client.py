"""Loads SPECs from the Hub that the environment names and prints what came of each, as JSON.

A process of its own, because the Hub's libraries read their environment when they are imported.
"""

from __future__ import annotations

import json
import sys

from reap_stream.errors import ReapStreamError
from tests.corpora import load, tokens_of


def outcome(spec, settings):
    """What a SPEC leads to: the corpus, or the error."""
    try:
        corpus = load(spec, **settings)
    except ReapStreamError as error:
        return {"error": type(error).__name__, "message": str(error)}
    texts = [bytes(token - 1 for token in row[1:-1]) for row in tokens_of(corpus)]
    return {
        "rows": [text.hex() for text in texts],
        "notes": corpus.notes,
        "sha256": corpus.sha256,
        "origin": corpus.origins[0].record(),
    }


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    sys.stdout.write(json.dumps([outcome(spec, settings) for spec, settings in asked]))
