"""`python -m data.jobs`: the process at the other end of a `data.workers.Pool`.

One job per line on stdin; beats and the result as lines of JSON on stdout.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from data.scan import scan, scan_member
from data.scores import score
from data.workers import Beat, full_disk
from flashvsr.base.cli import UserError

JOBS: dict[str, Callable[..., Any]] = {"scan": scan, "scan_member": scan_member, "score": score}
SECONDS_PER_BEAT = 0.5


def answer(work: Callable[..., Any], arguments: dict[str, Any], beat: Beat) -> dict[str, Any]:
    """{"result": …}, {"failed": reason}, or {"full": reason} when the disk is."""
    try:
        return {"result": work(**arguments, beat=beat)}
    # What libraries raise over damaged files; anything else is a bug of ours and ends the process.
    except (UserError, OSError, ValueError, OverflowError, MemoryError, EOFError) as error:
        text = str(error).strip() or type(error).__name__
        return {"full": text} if full_disk(error) else {"failed": text}


def main() -> None:
    # Whatever a library prints must not mix with the answers.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    last = 0.0

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS_PER_BEAT:
            last = time.monotonic()
            print("null", file=out, flush=True)

    beat()
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(answer(JOBS[job.pop("do")], job, beat)), file=out, flush=True)


if __name__ == "__main__":
    main()
