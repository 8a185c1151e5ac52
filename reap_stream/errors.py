"""The errors of reap_stream: one base, one child for each thing a user can do about it.

The exit code of the command line follows from the class: 2 when work was refused before it
began, 1 when the job failed while running, 130 when it was interrupted and can be resumed.
"""

from __future__ import annotations


class ReapStreamError(Exception):
    """Base of every error this package raises on purpose; `exit_code` is the command's status.

    `resumable` says that the same command may succeed when it goes on with what is done.
    """

    exit_code = 1
    resumable = False


class UsageError(ReapStreamError):
    """Arguments or settings that cannot be carried out: raised before any work."""

    exit_code = 2


class CheckpointError(ReapStreamError):
    """A source checkpoint that is damaged, inconsistent or unsafe: raised before any work."""

    exit_code = 2


class UnsupportedError(ReapStreamError):
    """A model family, layout or weight format that this version does not handle."""

    exit_code = 2


class CalibrationError(ReapStreamError):
    """Calibration data that is missing, malformed or does not fit the model."""

    exit_code = 2


class ResumeError(ReapStreamError):
    """A half-done job whose settings or source are not those of this command."""

    exit_code = 2


class ReadError(ReapStreamError):
    """Bytes of the source could not be read while the job was running."""

    resumable = True


class OutputError(ReapStreamError):
    """The output directory exists, is full, or could not be written."""


class NoRoomError(OutputError):
    """The disk has less room than the output needs: found before any work."""

    exit_code = 2


class ForwardError(ReapStreamError):
    """The model's forward failed, or gave numbers from which no expert can be scored."""


class VerificationError(ReapStreamError):
    """A written checkpoint does not hold what its source and its kept experts say it must."""


class InterruptedRunError(ReapStreamError):
    """The run was interrupted; what was finished is kept and `--resume` goes on from there."""

    exit_code = 130


class RankError(ReapStreamError):
    """Another rank of the job failed; `exit_code` and `resumable` are those of its error."""


class RankLostError(ReapStreamError):
    """Another rank of the job died, or does not answer; what was finished is kept."""

    resumable = True


def mark_told(error: BaseException) -> None:
    """Notes that another process of the job tells people of an error."""
    vars(error)["told"] = True


def is_told(error: BaseException) -> bool:
    """Whether another process of the job tells people of an error."""
    return bool(vars(error).get("told"))
