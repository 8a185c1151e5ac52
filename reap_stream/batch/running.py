"""Runs one job after another, each command in a process of its own, with a log for each job.

A job that is evaluated together with others waits, written, until the last of these is written too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from reap_stream.batch import process
from reap_stream.batch.evaluations import Evaluations
from reap_stream.batch.job import Job
from reap_stream.batch.lines import companions, eval_line, scores_of, sharing_key, writing_line
from reap_stream.batch.outcomes import Board
from reap_stream.batch.records import Record, Records, Status, new_record
from reap_stream.batch.steps import Step, pending, with_mark
from reap_stream.batch.waiting import wait_for_job
from reap_stream.checkpoint.disk import output_errors
from reap_stream.errors import ReapStreamError, UsageError


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs jobs.

    Attributes:
        records: what is remembered of them, and where logs go.
        statuses: how the writing of each job stands, by name.
        board: is told what becomes of them.
        evaluations: where what is found of them goes.
        say: tells people what happens.
    """

    records: Records
    statuses: Mapping[str, Status]
    board: Board
    evaluations: Evaluations
    say: Callable[[str], None]

    def run_all(self, jobs: Sequence[Job], *, fail_fast: bool) -> None:
        """Runs all jobs in their order.

        Args:
            jobs: the jobs, checked; their targets are known.
            fail_fast: stop at the first that fails.
        """
        for job in jobs:
            with self._failing(job):
                self._write(job, jobs)
            if fail_fast and self.board.failed:
                return
            together = companions(job, jobs)
            if together[-1] is not job:
                if self.board.is_open(job):
                    self.board.set(job, state="waiting")
                continue
            self._evaluate([other for other in together if self.board.is_open(other)])
            for other in together:
                if self.board.is_open(other) and not (fail_fast and self.board.failed):
                    with self._failing(other):
                        self._finish(other)
            if fail_fast and self.board.failed:
                return

    @contextmanager
    def _failing(self, job: Job) -> Iterator[None]:
        """What goes wrong is this job's failure, and no one else's."""
        try:
            yield
        except (ReapStreamError, OSError) as error:
            outcome = self.board.set(job, state="failed", error=str(error))
            self._tell(job, f"{outcome.said}: {error}")

    def _tell(self, job: Job, text: str) -> None:
        names = [outcome.job.name for outcome in self.board]
        self.say(f"[{names.index(job.name) + 1}/{len(names)}] {job.name}: {text}")

    def _write(self, job: Job, jobs: Sequence[Job]) -> None:
        """Writes the checkpoints, and compares them."""
        record = self.records.read(job)
        if self.statuses[job.name] != "done" or record is None:
            self._write_checkpoints(job, jobs, record)
        if record is None or not record.written or self.statuses[job.name] != "done":
            self.records.change(job, written=True)
        self.board.set(job, written=True)
        for step in self._pending(job):
            if step.kind == "verify":
                self._do(job, step)

    def _write_checkpoints(self, job: Job, jobs: Sequence[Job], record: Record | None) -> None:
        if record is not None and self.statuses[job.name] == "resume":
            wait_for_job(job.output, lambda text: self._tell(job, text))
            scores = None if record.scores is None else Path(record.scores)
            if scores is None or scores.is_file():
                self.records.change(job, failed=False)
                line = writing_line(job, scores, resume=True)
                code = self._run([job], line[0], f"{line[0]} → {job.output}, resumed", line)
                # What cannot be resumed is replaced where that was asked for.
                if code != UsageError.exit_code or not job.overwrite:
                    self._check_written(job, code)
                    return
        scores = self._shared_scores(job, jobs)
        code = self._begin(job, scores)
        if scores is not None and code == UsageError.exit_code:
            # The model may be another one than when the scores were taken.
            code = self._begin(job, None)
        self._check_written(job, code)

    def _begin(self, job: Job, scores: Path | None) -> int:
        """Writes a job's checkpoints from the start; the exit status."""
        self.records.write(job, new_record(job, scores))
        line = writing_line(job, scores)
        if self.statuses[job.name] == "resume" and not (job.overwrite or job.output.exists()):
            # Nothing lies there but a half-done job whose scores are gone.
            line.append("--overwrite")
        return self._run([job], line[0], f"{line[0]} → {job.output}", line)

    def _check_written(self, job: Job, code: int) -> None:
        if code != 0:
            # What lies at its output from now on is another's.
            self.records.change(job, failed=True)
        self._check(job, code)

    def _shared_scores(self, job: Job, jobs: Sequence[Job]) -> Path | None:
        """Scores of a finished job that has its reading in common with this one."""
        key = sharing_key(job)
        if key is None:
            return None
        for other in jobs:
            if other is not job and sharing_key(other) == key and self._is_written(other):
                scores = scores_of(other)
                if scores is not None:
                    return scores
        return None

    def _is_written(self, job: Job) -> bool:
        return self.board[job].written or self.statuses[job.name] == "done"

    def _evaluate(self, jobs: Sequence[Job]) -> None:
        """Evaluates checkpoints together; where that fails, those of each job by themselves."""
        todo = [job for job in jobs if any(step.kind == "eval" for step in self._pending(job))]
        if len(todo) > 1:
            try:
                self._evaluate_together(todo)
            except (ReapStreamError, OSError) as error:
                self.say(f"evaluating {', '.join(job.name for job in todo)} together: {error}")
            else:
                return
        for job in todo:
            with self._failing(job):
                self._evaluate_together([job])

    def _evaluate_together(self, jobs: Sequence[Job]) -> None:
        self.evaluations.begin()
        first, *others = jobs
        for job in others:
            with self._log(job).open("a", encoding="utf-8") as log:
                log.write(f"evaluated together with {first.name}: see {self._log(first).name}\n")
        names = ", ".join(job.name for job in others)
        remaining = [job.remaining for job in jobs]
        line = eval_line(remaining, self.evaluations.scratch)
        text = f"eval together with {names}" if others else "eval"
        self._check(first, self._run(jobs, "eval", text, line))
        self.evaluations.divide(remaining)
        for job in jobs:
            for step in self._pending(job):
                if step.kind == "eval":
                    self._note(job, step)
            self.board.set(job, state="waiting")

    def _finish(self, job: Job) -> None:
        """Does what is left to do with a job's checkpoints."""
        for step in self._pending(job):
            if step.kind == "report":
                page = Path(step.detail)
                with output_errors(page):
                    page.parent.mkdir(parents=True, exist_ok=True)
                self.records.change(job, report=str(job.report))
            self._do(job, step)
        idle = not self.board[job].step
        self._tell(job, self.board.set(job, state="skipped" if idle else "done").said)

    def _pending(self, job: Job) -> list[Step]:
        record = self.records.read(job)
        return pending(job, () if record is None else record.steps, self.evaluations)

    def _do(self, job: Job, step: Step) -> None:
        where = step.line[2] if step.kind == "upload" else step.directory.name
        self._check(job, self._run([job], step.kind, f"{step.kind} {where}", step.line))
        self._note(job, step)

    def _note(self, job: Job, step: Step) -> None:
        record = self.records.read(job)
        marks = () if record is None else record.steps
        self.records.change(job, steps=with_mark(marks, step))

    def _log(self, job: Job) -> Path:
        return self.records.directory / f"{job.name}.log"

    def _run(self, jobs: Sequence[Job], step: str, text: str, line: Sequence[str]) -> int:
        """Runs a command, which goes into the log of the first of its jobs; its exit status."""
        how = {"how": step} if step in ("prune", "compact") else {}
        for job in jobs:
            self.board.set(job, state="running", step=step, **how)
        self._tell(jobs[0], text)
        started = time.monotonic()
        code = process.run_line(line, jobs[0].base, self._log(jobs[0]))
        seconds = (time.monotonic() - started) / len(jobs)
        for job in jobs:
            record = self.records.read(job)
            before = 0.0 if record is None else record.seconds
            self.records.change(job, seconds=before + seconds)
            self.board.set(job, exit_code=code)
        return code

    def _check(self, job: Job, code: int) -> None:
        if code != 0:
            raise _CommandError(process.why_failed(code, self._log(job)))


class _CommandError(ReapStreamError):
    """A command of a job ended otherwise than well."""
