"""The parent's end of the pipe to a worker: a line of JSON each way."""

import collections
import contextlib
import json
import pathlib
import subprocess
import threading

PATIENCE = 3600  # Seconds for an answer. ART's AutoAttack takes a quarter of an hour.


class WorkerError(Exception):
    """A worker could not do what it was asked to."""


class Worker:
    """A process that answers requests.

    Args:
        command: The command that starts it.
        log: The file for what it prints.
        environment: Its environment variables, by default those of this process.
        patience: After so many seconds without an answer it is ended.
    """

    def __init__(self, command, log, environment=None, patience=PATIENCE):
        self.log, self.patience = pathlib.Path(log), patience
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment,
            )

    def ask(self, do, **arguments):
        """Sends a request, and returns the answer.

        Raises:
            WorkerError: The answer is an error, or there is none, as the process ended
                or took too long.
        """
        timer = threading.Timer(self.patience, self.process.kill)
        timer.daemon = True  # Nobody waits for it who interrupts all this.
        timer.start()
        try:
            print(
                json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True
            )
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if late:
            raise WorkerError(f"no answer to {do!r} within {self.patience} s")
        try:
            answer = json.loads(line)
        except ValueError:  # None, or what it managed to write.
            status = self.process.wait()
            words = self.last_words()
            raise WorkerError(f"ended with status {status}: {words}") from None
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def last_words(self):
        """The last lines that the worker printed."""
        with self.log.open(errors="replace") as file:
            return "".join(collections.deque(file, 5)).strip()

    def close(self):
        """Ends the worker, which ends with its input."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
