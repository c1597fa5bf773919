#!/usr/bin/env python3
"""A prepared catalogue through several OpenAI servers, with Ray Data: vLLM, llama-server, Ollama, on any machines.

    pip install 'ray[data]>=2.60,<3'                                   (in an environment of its own: 620 MB)
    python catalogue.py prepare courses.csv requests.jsonl --model NAME
    python ray_catalogue.py requests.jsonl outputs.jsonl --server http://one:8080/v1 --server http://two:8080/v1
    python catalogue.py collect requests.jsonl outputs.jsonl drafts.jsonl

What is answered is kept in `outputs.jsonl.parts` by Ray Data's own checkpoints, up to eight requests a file: after any
break, the same command goes on, and a request that has changed since is asked anew. A server that dies loses nothing:
others answer for it, and it is tried again every few seconds. RAY_ADDRESS names a cluster; its machines must then share
the directory of both files.
"""

import argparse
import hashlib
import json
import logging
import os
import random
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would tell its makers of each run

import pyarrow
import ray
from ray.data.block import BlockMetadata
from ray.data.checkpoint import CheckpointConfig
from ray.data.datasource import BlockBasedFileDatasink, Datasource, ReadTask

ROWS = 8  # of a block at most, which a break costs at most for each request in flight
REST = 5  # seconds without requests, for a server that failed
LATER = {408, 425, 429, 500, 502, 503, 504}  # another server, or the same one later, may answer well


def mark_of(line):
    """What tells one request from all others, and from what it was before it changed."""
    return hashlib.sha256(line.strip()).hexdigest()[:32]


class Requests(Datasource):
    """The file's lines as rows `mark` and `request`."""

    def __init__(self, path, in_flight):
        self.path, self.blocks = str(path), []
        with path.open("rb") as file:
            count = sum(1 for _ in file)
            file.seek(0)
            rows = min(ROWS, count // (4 * in_flight) + 1)  # so that none of them has much left at the end
            while lines := [line for _ in range(rows) if (line := file.readline())]:
                self.blocks.append((file.tell() - sum(map(len, lines)), len(lines)))

    def estimate_inmemory_data_size(self):
        return Path(self.path).stat().st_size

    def get_read_tasks(self, parallelism, per_task_row_limit=None, data_context=None):
        def task(at, count):
            metadata = BlockMetadata(count, None, [self.path], None)
            return ReadTask(lambda path=self.path: [block_of(path, at, count)], metadata)

        return [task(at, count) for at, count in self.blocks]


def block_of(path, at, count):
    with open(path, "rb") as file:
        file.seek(at)
        lines = [line for _ in range(count) if (line := file.readline()).strip()]
    return pyarrow.table({"mark": [mark_of(line) for line in lines], "request": [line.decode() for line in lines]})


class Outputs(BlockBasedFileDatasink):
    """Each block as a file of lines: a request's mark, a tab, and its output in the Batch format."""

    def write_block_to_file(self, block, file):
        for mark, output in block.to_arrow().select(["mark", "output"]).to_pandas().itertuples(index=False):
            file.write(f"{mark}\t{output}\n".encode())


@ray.remote(num_cpus=0)
class Servers:
    """Which server is the next to ask: of those that work, the one with the fewest requests."""

    def __init__(self, urls):
        self.running = dict.fromkeys(urls, 0)
        self.rests = dict.fromkeys(urls, 0.0)  # until then

    def take(self):
        """None while all of them rest."""
        ready = [url for url, until in self.rests.items() if until <= time.monotonic()]
        if not ready:
            return None
        url = min(ready, key=lambda url: (self.running[url], random.random()))
        self.running[url] += 1
        return url

    def give_back(self, url, works):
        self.running[url] -= 1
        self.rests[url] = 0.0 if works else time.monotonic() + REST


class Ask:
    """A request's output. One of these for each request in flight."""

    def __init__(self, servers, key, timeout, patience):
        self.servers, self.timeout, self.patience = servers, timeout, patience
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def __call__(self, row):
        request = json.loads(row["request"])
        begun, fault = time.monotonic(), "no server works"
        while time.monotonic() - begun < self.patience:
            if (server := ray.get(self.servers.take.remote())) is None:
                time.sleep(0.5)
                continue
            status, body, fault = 503, {}, ""
            try:
                status, body = self.post(server, request["body"])
            except (OSError, ValueError) as error:  # refused, reset, too slow, no JSON
                fault = f"{server}: {error}"
            ray.get(self.servers.give_back.remote(server, status not in LATER))
            if status not in LATER:
                response = {"status_code": status, "request_id": str(body.get("id", "")), "body": body}
                output = {"id": row["mark"], "custom_id": request["custom_id"], "response": response, "error": None}
                return {"mark": row["mark"], "output": json.dumps(output, ensure_ascii=False)}
            fault = fault or f"{server}: {status} {json.dumps(body)[:200]}"
        raise RuntimeError(f"no answer for {request['custom_id']} in {self.patience:.0f} s; {fault}")

    def post(self, server, body):
        """Status and document of an answer. Raises OSError or ValueError where there is none."""
        asked = urllib.request.Request(f"{server}/chat/completions", json.dumps(body).encode(), self.headers)
        try:
            with urllib.request.urlopen(asked, timeout=self.timeout) as answer:
                status, document = answer.status, json.load(answer)
        except urllib.error.HTTPError as refusal:
            with refusal:
                text = refusal.read(65536).decode(errors="replace")
            try:
                status, document = refusal.code, json.loads(text)
            except ValueError:
                status, document = refusal.code, {"error": {"message": text[:500]}}
        if not isinstance(document, dict):
            raise ValueError("the answer is no JSON object")
        return status, document


def join(parts, requests, outputs):
    """Write what is answered into one file; how many requests there are, and how many of them are answered."""
    with requests.open("rb") as file:
        marks = {mark_of(line) for line in file if line.strip()}
    count, joined = len(marks), outputs.with_name(f"{outputs.name}.new")
    with joined.open("wb") as out:
        for part in sorted(parts.glob("*.jsonl")):
            with part.open("rb") as file:
                for line in file:
                    mark, _, output = line.partition(b"\t")
                    if mark.decode() in marks:  # else its request has changed, or it stands twice
                        marks.remove(mark.decode())
                        out.write(output)
    joined.replace(outputs)
    return count, count - len(marks)


def ask_all(options, parts):
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    checkpoints = CheckpointConfig("mark", str(parts / "checkpoints"), delete_checkpoint_on_success=False)
    checkpoints.checkpoint_actor_memory_bytes = 64 * 2**20  # its 1 GB is more than a small machine has
    checkpoints.checkpoint_actor_pool_max_size = 1
    context.checkpoint_config = checkpoints
    servers = Servers.remote([server.rstrip("/") for server in options.server])
    in_flight = options.in_flight or 2 * len(options.server)
    arguments = (servers, os.environ.get("OPENAI_API_KEY", ""), options.timeout, options.patience)
    requests = ray.data.read_datasource(Requests(options.requests, in_flight))
    pool = ray.data.ActorPoolStrategy(size=in_flight)
    answered = requests.map(Ask, fn_constructor_args=arguments, compute=pool, num_cpus=0.1)
    answered.write_datasink(Outputs(str(parts / "files"), file_format="jsonl"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", type=Path, help="as catalogue.py's `prepare` writes it")
    parser.add_argument("outputs", type=Path, help="for catalogue.py's `collect`")
    parser.add_argument("--server", action="append", required=True, metavar="URL", help="with /v1; once for each")
    parser.add_argument("--in-flight", type=int, metavar="N", help="requests at a time (two for each server)")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds of one request")
    parser.add_argument("--patience", type=float, default=3600, metavar="S", help="seconds of one course, all tries")
    options = parser.parse_args()
    if not options.requests.is_file():
        parser.error(f"there is no {options.requests}")
    parts = options.outputs.resolve().with_name(f"{options.outputs.name}.parts")
    # Work that waits for servers needs no cores, but Ray counts one each for reading, filtering and writing.
    local = {"num_cpus": max(4, os.cpu_count() or 1), "include_dashboard": False, "object_store_memory": 256 * 2**20}
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.init(log_to_driver=False, **({} if "RAY_ADDRESS" in os.environ else local))
    fault = ""
    try:
        ask_all(options, parts)
    except ray.exceptions.RayError as error:
        fault = f"Stopped: {str(error).strip().splitlines()[-1]}. "
    except KeyboardInterrupt:
        fault = "Stopped. "
    finally:
        ray.shutdown()
    count, answered = join(parts / "files", options.requests, options.outputs)
    again = "" if answered == count else " The same command goes on."
    print(f"{fault}{answered:,} of {count:,} requests are answered in {options.outputs}.{again}", file=sys.stderr)
    return 0 if answered == count else 3


if __name__ == "__main__":
    sys.exit(main())
