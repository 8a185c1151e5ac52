"""`reap-stream card`: arguments become a rendering."""

from __future__ import annotations

import argparse

from reap_stream.card.inputs import read_inputs
from reap_stream.card.writing import rewrite_card
from reap_stream.upload.checksums import refresh_checksums


def card(arguments: argparse.Namespace) -> None:
    """`reap-stream card`."""
    directory = arguments.directory
    written = rewrite_card(directory, arguments.eval, arguments.base_model)
    refresh_checksums(directory, written)
    inputs = read_inputs(directory)
    state = "not evaluated" if inputs.evaluation is None else "with its evaluation"
    print(  # noqa: T201 - this is the command line
        f"{directory}: {', '.join(written)} written, {state}; source: {inputs.base}; a name for it: "
        f"{inputs.name}"
    )
