#!/usr/bin/env python3
"""Badge drafts for courses: four at once on one HTTP/2 connection, as JSON lines on standard output.

    pip install 'httpx[http2]'
    python client.py course.txt syllabus.pdf
    python client.py --url https://localhost:8443 --insecure --drafts 1 courses.jsonl

A course is a text file, a document (PDF, DOCX, PPTX, ODT), or a line of a .jsonl file: an object with `content` and any
other field of a request. A connection that breaks costs nothing: no draft is begun twice, and its events go on after
the last one received.

Exit codes: 0 all drafts are written, 1 some failed, 2 wrong usage, 130 Ctrl-C.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: Ctrl-C while modules are read in shows no traceback

# ruff: noqa: E402
import argparse
import asyncio
import contextlib
import json
import os
import re
import sys
import uuid
from pathlib import Path

try:
    import h2  # noqa: F401 - httpx needs it for HTTP/2
    import httpx
except ImportError as error:
    sys.exit(f"client.py: {error}. Install what it needs: pip install 'httpx[http2]'")

ATTEMPTS = 6  # without an event in between, over 6 seconds
KEPT = ("achievement", "model", "usage")  # of the last event, beside the badge
# What comes of an answer that another program gave.
FOREIGN = (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError, AttributeError, RecursionError)


class Failed(Exception):
    """A draft that will not come, and why."""


class Unreachable(Failed):
    """No draft will come."""


class Refused(Exception):
    """Wrong usage: a sentence that says what to do."""


def courses_in(path):
    """The name of each course in a file, and how httpx is to send it."""
    if path == "-" and sys.stdin is None:
        raise Refused("Standard input is closed.")
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}.") from None
    if path.endswith(".jsonl"):
        lines = [(number, line) for number, line in enumerate(data.splitlines(), 1) if line.strip()]
        if not lines:
            raise Refused(f"{path} is empty.")
        return [(f"{path}:{number}", {"json": fields_in(path, number, line)}) for number, line in lines]
    with contextlib.suppress(UnicodeDecodeError):
        if not data.startswith((b"%PDF", b"PK\3\4", b"{\\rtf")) and b"\0" not in data:
            return [(path, {"json": {"content": data.decode("utf-8-sig")}})]
    # The service tells what it is, texts that are not UTF-8 too.
    return [(path, {"files": {"file": (os.fsencode(Path(path).name).decode(errors="replace"), data)}})]


def fields_in(path, number, line):
    with contextlib.suppress(ValueError, RecursionError):
        fields = json.loads(line)
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()  # Python reads more than it may send
        if isinstance(fields, dict):
            return fields
    raise Refused(f"{path}, line {number} is not a JSON object.")


async def refuse(response):
    """Raise what a problem document (RFC 9457) says, with every fault of the request."""
    await response.aread()
    if response.status_code == 204:
        raise Failed("the service has lost this draft, perhaps in a restart; ask for it again")
    try:
        problem = response.json()
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in problem.get("errors") or ()]
        message = "; ".join([f"{problem['detail']} ({problem['error_code']})", *faults])
        if "retry-after" in response.headers:
            message += f"; Retry-After: {response.headers['retry-after']} seconds"
    except FOREIGN:
        message = f"{response.request.url} answered {response.status_code}; is the address right?"
    raise Failed(message)


async def events_of(response):
    """The id and the data of each Server-Sent Event; this service writes the data on one line."""
    id = ""
    async for line in response.aiter_lines():
        if line.startswith("id: "):
            id = line[4:]
        elif line.startswith("data: "):
            yield id, json.loads(line[6:])


async def write(client, request, say):
    """The badge and the achievement of one draft, its model and usage. Raises Failed."""
    # A POST that is repeated with the same key gets the generation that the first one began.
    headers = {"Prefer": "respond-async", "Idempotency-Key": uuid.uuid4().hex}
    path = last_id = ""
    attempts = 0
    while True:
        try:
            if not path:
                response = await client.post("/generate", headers=headers, **request)
                if response.status_code != 202:
                    await refuse(response)
                path = f"/generations/{response.json()['id']}"
                headers = {}
            async with client.stream(
                "GET", f"{path}/events", params={"accumulated": "false", "partial": "true"}, headers=headers
            ) as response:
                if response.status_code != 200:
                    await refuse(response)
                async for last_id, event in events_of(response):
                    attempts = 0
                    headers = {"Last-Event-ID": last_id}
                    if event["type"] == "final":
                        return {"badge": event["content"], **{key: event[key] for key in KEPT}}
                    if event["type"] == "error":
                        raise Failed(f"{event['error']} ({event['error_code']})")
                    if event["type"] == "queue":
                        say(f"number {event['position']} in the queue" if event["position"] else "begun")
                    if event["type"] == "partial":
                        say(f"writing {list(event['badge'])[-1]}")
            raise httpx.RemoteProtocolError("the events ended early")
        except httpx.TransportError as error:
            attempts += 1
            if attempts == ATTEMPTS:
                kind = Unreachable if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)) else Failed
                raise kind(f"no connection to {client.base_url}: {error or type(error).__name__}") from error
            say("connecting again")
            await asyncio.sleep(0.1 * 2**attempts)
        except FOREIGN as error:
            raise Failed(f"{client.base_url} does not answer as dccapi does; is the address right?") from error
        except asyncio.CancelledError:
            # Ctrl-C: an asynchronous generation would go on without us, also one whose answer is still on its way.
            with contextlib.suppress(*FOREIGN):
                if not path:
                    response = await client.post("/generate", headers=headers, timeout=2, **request)
                    path = f"/generations/{response.json()['id']}"
                await client.delete(path, timeout=2)
            raise


def connected(arguments):
    """A client of the service, which is used with `async with`. Raises Refused."""
    try:
        url = httpx.URL(arguments.url)
        if not re.match(r"https?://[^\s/?#]+(/[^\s?#]*)?$", arguments.url) or not 0 <= (url.port or 0) < 65536:
            raise ValueError("It needs http:// or https://, a host, and no port above 65535")
    except (httpx.InvalidURL, ValueError) as error:
        told = f"{arguments.url} is no address of a service. {error}. Write it as http://localhost:8001."
        raise Refused(told) from None
    if not re.fullmatch("[!-~]*", arguments.api_key):
        raise Refused("A key has only letters, digits and signs of ASCII.")
    try:
        return httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {},
            http2=True,
            http1=url.scheme == "https",  # without TLS nothing would tell which of them is spoken
            verify=not arguments.insecure,
            timeout=httpx.Timeout(10, read=60),  # a stream bears a comment every 15 seconds at least
        )
    except (OSError, ImportError, ValueError) as error:
        raise Refused(f"{str(error).rstrip('.')}. Look at the proxies and SSL_CERT_FILE in the environment.") from None


async def run(arguments):
    """The exit code. Raises Refused and Unreachable, and OSError where a draft cannot be written down."""
    if sys.stdout is None:
        raise Refused("Standard output is closed: the drafts go there.")
    courses = [course for file in arguments.files for course in courses_in(file)]
    at_once = asyncio.Semaphore(4)

    async def draft(client, name, number, request):
        said = [""]

        def say(text):
            if text != said[-1]:
                said.append(text)
                print(f"{name}, draft {number}: {text}", file=sys.stderr)

        async with at_once:
            try:
                written = await write(client, request, say)
            except Unreachable:
                raise
            except Failed as failure:
                say(f"failed: {failure}")
                return False
        say("done")
        print(json.dumps({"course": name, "draft": number, **written}), flush=True)
        return True

    async with connected(arguments) as client:
        numbers = range(1, arguments.drafts + 1)
        drafts = [draft(client, name, number, request) for name, request in courses for number in numbers]
        tasks = [asyncio.ensure_future(one) for one in drafts]
        try:
            return 0 if all(await asyncio.gather(*tasks)) else 1
        finally:  # Ctrl-C, or nobody reads on: every draft under way cancels its generation
            for task in tasks:
                if not task.cancelling():  # a second time would end the request that cancels its generation
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="texts, documents and .jsonl files; - is standard input")
    parser.add_argument("--url", default=os.environ.get("DCCAPI_URL", "http://localhost:8001"), help="or DCCAPI_URL")
    parser.add_argument(
        "--api-key",
        type=str.strip,
        default=os.environ.get("DCCAPI_KEY", ""),
        help="or DCCAPI_KEY, which `ps` cannot show",
    )
    parser.add_argument(
        "--drafts", type=int, choices=range(1, 17), metavar="N", default=4, help="how many of each course (4)"
    )
    parser.add_argument("--insecure", action="store_true", help="trust any certificate, such as a self-signed one")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return asyncio.run(run(parser.parse_args()))
    except Refused as error:
        print(f"client.py: {error}", file=sys.stderr)
        return 2
    except Unreachable as error:
        print(f"client.py: failed: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # Python would try once more at its end to write what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # nobody reads on, as with `| head`
            print(f"client.py: the drafts cannot be written down: {error.strerror}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("client.py: stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
