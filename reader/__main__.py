"""The program that reads for the service. Documents can be made to take minutes and gigabytes, so none is read there.

`python -m reader` reads lines of JSON from stdin, `{"task": one of TASKS, ...its arguments}`, and writes one for each
to stdout: what the task returns, or `{"error", "detail"}`. It ends when stdin does, and not by SIGTERM, which is the
service's to answer. Its memory, its processor time, its files and its network are limited.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from reader.condense import condense
from reader.course_text import plain_text
from reader.documents import document
from reader.extract import DETAILS, TOO_LARGE, Refused, repair_notes
from reader.review import language_of, review, title_grounds
from reader.skills import aligned, search

MAX_MEMORY = 2**29  # bytes of one process
MAX_SECONDS = {"document": 15}  # of processor time; others have 5


def text(content: str) -> dict[str, Any]:
    """What a course says, without its markup."""
    said = plain_text(content)
    grounds, notes = title_grounds(said.text), repair_notes(said.repairs)
    return {"text": said.text, "language": language_of(said.text), "notes": notes, "grounds": grounds}


def reviewed(index: str = "", skills: Sequence[str] = (), **arguments: Any) -> dict[str, Any]:
    """A review, and with an index of skills the alignments of the badge beside it. /health tells of its faults."""
    found = review(**arguments)
    more = aligned(index, skills, arguments["course"], found["language"]) if index else {}
    return found | more if "fault" not in more else found


def condensed(**arguments: Any) -> dict[str, Any]:
    """What is left of a long course, without its markup."""
    found = condense(**arguments)
    return found | {"text": plain_text(found["text"]).text}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "text": text,
    "document": document,
    "condense": condensed,
    "review": reviewed,
    "skills": search,
}


def answered(request: dict[str, Any]) -> bytes:
    """The answer to a request. Each document is read in a process of its own: parsers in C end that, not this one,
    and keep no memory."""
    return _answered_apart(request) if request.get("task") == "document" else orjson.dumps(result_of(request))


def result_of(request: dict[str, Any]) -> dict[str, Any]:
    """What a task returns, or why it does not."""
    name = request.pop("task", None)
    try:
        _allow(MAX_SECONDS.get(name, 5))
        return TASKS[name](**request)
    except Refused as refused:
        return _error(refused.code, refused.detail)
    except MemoryError:
        return _error("document_broken", TOO_LARGE)
    except Exception:  # a parser met what it was not made for
        return _error("document_broken")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _error(code: str, detail: str = "") -> dict[str, Any]:
    return {"error": code, "detail": detail or DETAILS[code]}


def _answered_apart(request: dict[str, Any]) -> bytes:
    outlet, inlet = os.pipe()
    if not (process := os.fork()):
        try:
            os.close(outlet)
            _end_with_parent()
            answer = orjson.dumps(result_of(request))
            with open(inlet, "wb") as pipe:
                pipe.write(answer)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(inlet)
    with open(outlet, "rb") as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status == 0:
        return answer
    slow = status == -signal.SIGXCPU
    return orjson.dumps(_error("document_too_slow") if slow else _error("document_broken", TOO_LARGE))


def _end_with_parent() -> None:
    """The service kills the process that it has started. Where there is no prctl, the limits end this one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == 1:  # it is dead already
            os._exit(1)


def _allow(seconds: int) -> None:
    """Sets the processor time of a task. Python is interrupted after it; C code that goes on is killed by SIGXCPU."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (_at_most(hard, int(used.ru_utime + used.ru_stime) + seconds + 3), hard))
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.5)


def _at_most(hard: int, size: int) -> int:
    """A limit that may be set where there is a hard one, which only root can raise."""
    return size if hard == resource.RLIM_INFINITY else min(size, hard)


def _too_slow(*_: object) -> None:
    raise Refused("document_too_slow")


def _confine() -> None:
    """Limits what a document that takes over a parser can do: memory, files, network, other programs."""
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 4096,
    }  # of files: libraries try whether they can write one
    if sys.platform != "darwin":  # which knows no limit of memory
        limits[resource.RLIMIT_AS] = MAX_MEMORY
    for kind, size in limits.items():
        size = _at_most(resource.getrlimit(kind)[1], size)
        resource.setrlimit(kind, (size, size))
    sys.dont_write_bytecode = True  # Python would leave half of a .pyc file, and read it ever after (cpython 126606)
    signal.signal(signal.SIGPROF, _too_slow)
    sys.addaudithook(_refuse)


# A socket alone reaches nobody, and urllib3 binds one when it is imported.
FORBIDDEN = (
    "socket.connect",
    "socket.send",
    "socket.get",
    "subprocess.",
    "os.exec",
    "os.posix_spawn",
    "os.system",
)


def _refuse(event: str, _: object) -> None:
    if event.startswith(FORBIDDEN):
        raise PermissionError(event)


def main() -> None:
    """Reads requests from stdin, writes answers to stdout, each a line, until EOF."""
    _confine()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for line in sys.stdin.buffer:
        answer = answered(orjson.loads(line))
        # A document that has taken its process over may write anything, but not the answer to the next request.
        sys.stdout.buffer.write(answer.replace(b"\n", b" ") + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
