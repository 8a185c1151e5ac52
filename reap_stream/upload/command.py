"""`reap-stream upload`: arguments become one upload, or a list of what it would send."""

from __future__ import annotations

import argparse
import sys

from reap_stream.card.usage import CHECKSUMS_FILE
from reap_stream.upload.rights import Target
from reap_stream.upload.sending import survey
from reap_stream.upload.sending import upload as run_upload


def upload(arguments: argparse.Namespace) -> None:
    """`reap-stream upload`."""
    target = Target(arguments.repository, arguments.revision, arguments.public)
    if arguments.dry_run:
        report = survey(arguments.directory, target)
        _say(report.table())
        seen = "public" if arguments.public else "private"
        outcome = (
            f"would go to {report.url}, which is made {seen} if it is not there, with their hashes in"
            f" {CHECKSUMS_FILE}; nothing was sent, hashes were not checked"
        )
    else:
        report = run_upload(arguments.directory, target, arguments.commit_message)
        outcome = (
            f"{len(report.files)} files, {report.nbytes} bytes are at {report.url} (commit "
            f"{report.commit}); lengths and hashes read back are the same"
        )
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)  # noqa: T201 - this is the command line
    _say(f"{arguments.directory}: {outcome}")


def _say(text: str) -> None:
    print(text)  # noqa: T201 - as above
