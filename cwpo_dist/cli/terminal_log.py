"""Log records and faults in; lines on stderr, without credentials, out."""

from __future__ import annotations

import logging
import sys
import traceback
from types import TracebackType

from cwpo_dist.redaction import redacted
from cwpo_dist.terminal_text import harmless


def told_without_credentials(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """A fault that is not the user's, with its traceback: a library's message may hold a URL."""
    sys.stderr.write(harmless(redacted("".join(traceback.format_exception(kind, error, trace)))))


class _Stderr(logging.Handler):
    """Logs to what is stderr at the moment: while a progress bar is shown, that prints above it."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{harmless(redacted(self.format(record)))}\n")


def log_to_terminal() -> None:
    """Everything of ours is logged, of libraries what is wrong."""
    handlers = [_Stderr()]
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers)
    logging.getLogger("cwpo_dist").setLevel(logging.INFO)
