"""The containers, built and run by podman. Skipped without podman, debootstrap and root, except in CI.

No registry is asked: the base image is made by debootstrap, and `ollama` is a stand-in on top of the image under test.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

import dccapi
from testkit import flood_of_resets, free_port, parse_sse, status_line, trusting_tls

HERE = Path(__file__).resolve().parents[1]  # the checkout
COURSE = {"content": "Knots for climbers: figure eight, clove hitch, prusik. Practical exam on the wall."}
SLOW_COURSE = {"content": "Knots, slowly."}
GGUF = "MIT_OB_Phi-4-mini-instruct.Q4_K_M.gguf"
BASE, TAG, STAND_IN = "localhost/dccapi-test-base:bookworm", "test", "localhost/dccapi-test-ollama:latest"
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"

MISSING = [program for program in ("podman", "debootstrap") if not shutil.which(program)]
MISSING += ["root"] if os.geteuid() else []
pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,  # podman's networks cut connections of browsers
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING) and not os.environ.get("CI"), reason=f"needs {', '.join(MISSING)}"),
]

# ---------------------------------------------------------------- images

STAND_IN_CONTAINERFILE = f"""
FROM localhost/dccapi:{TAG}
USER 0
COPY testkit.py ollama /usr/bin/
ENV OLLAMA_HOST=0.0.0.0:11434
ENTRYPOINT ["/bin/ollama"]
CMD ["serve"]
"""

STAND_IN_PROGRAM = r'''#!/opt/venv/bin/python3
"""`ollama serve`, `list`, `show` and `create -f`, as far as the compose file uses them."""

import asyncio
import http.client
import json
import os
import re
import signal
import sys
from pathlib import Path

from testkit import Script, ScriptedOllama

KEPT = Path.home() / ".ollama" / "models.json"  # where Ollama keeps its models, below HOME


class Ollama(ScriptedOllama):
    host = "0.0.0.0"

    def info(self, path):
        if name := path.partition("/api/create/")[2]:
            self.models = sorted({*self.models, f"{name}:latest"})
            KEPT.write_text(json.dumps(self.models))
            return {"status": "success"}
        return super().info(path)


async def serve():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with Ollama(json.loads(KEPT.read_text()) if KEPT.exists() else [], 11434) as engine:
        engine.script = lambda body, index: Script(delay=0.05 if "slowly" in body["prompt"] else 0)
        await stop.wait()  # and end at once, as Ollama does


def ask(path):
    at = os.environ["OLLAMA_HOST"].removeprefix("http://").replace("0.0.0.0", "127.0.0.1")
    connection = http.client.HTTPConnection(at, timeout=5)
    connection.request("GET", path)
    return json.load(connection.getresponse())


def main(command, name="", option="", modelfile=""):
    if command == "serve":
        return asyncio.run(serve())
    names = [model["name"] for model in ask("/api/tags")["models"]]
    if command == "list":
        print("NAME", *names, sep="\n")
    elif command == "show" and f"{name}:latest" not in names:
        return f"Error: model '{name}' not found"
    elif command == "create" and option == "-f":
        gguf = Path(modelfile).parent / re.search(r"^FROM (.*)", Path(modelfile).read_text(), re.M)[1]
        if not gguf.read_bytes().startswith(b"GGUF"):
            return "Error: unsupported file"
        print(ask(f"/api/create/{name}")["status"])


try:
    sys.exit(main(*sys.argv[1:]))
except OSError as error:
    sys.exit(f"Error: {error}")
'''


def local_pip_settings(directory: Path) -> list[str]:
    """Options of `podman build` that let pip there reach what it reaches here; nothing of it stays in an image."""
    listed = subprocess.check_output([sys.executable, "-m", "pip", "config", "list"], text=True)
    settings = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = ast.literal_eval(value)
    (directory / "pip.conf").write_text("[global]\n" + "".join(f"{name} = {settings[name]}\n" for name in settings))
    # An index in a directory refers to files beside it.
    paths = {
        Path(path).parent if index else Path(path)
        for value in settings.values()
        for index, path in re.findall(r"(?:^|\s)(file://)?(/\S+)", value)
    }
    mounts = [f"{path}:{path}:ro" for path in sorted(paths) if path.exists()]
    return [f"--volume={mount}" for mount in [f"{directory}/pip.conf:/etc/pip.conf:ro", *mounts]]


def environment(directory: Path) -> dict[str, str]:
    # podman's own limits are above what a machine without privileges may set.
    conf = '[containers]\ndefault_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]\n'
    if shutil.which("runc"):
        conf += '[engine]\nruntime = "runc"\n'
    (directory / "containers.conf").write_text(conf)
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    return kept | {
        "CONTAINERS_CONF": os.environ.get("CONTAINERS_CONF", str(directory / "containers.conf")),
        "BUILDAH_FORMAT": "docker",  # the other one has no HEALTHCHECK
        "BASE_IMAGE": BASE,
        "OLLAMA_IMAGE": STAND_IN,
        "DCCAPI_TAG": TAG,
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Builds all images; the environment in which podman and podman-compose find them."""
    assert not MISSING
    directory = tmp_path_factory.mktemp("images")
    env = environment(directory)

    def run(*command: str, **options: Any) -> None:
        subprocess.run(command, env=env, check=True, **options)

    if subprocess.run(["podman", "image", "exists", BASE], env=env).returncode:
        rootfs = directory / "rootfs"
        run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(rootfs))
        archive = subprocess.Popen(["tar", "--directory", rootfs, "--create", "."], stdout=subprocess.PIPE)
        with archive:
            run("podman", "import", "-", BASE, stdin=archive.stdout)
        assert archive.returncode == 0
        shutil.rmtree(rootfs)
    options = shlex.join(local_pip_settings(directory))
    compose = [sys.executable, "-m", "podman_compose", f"--podman-build-args={options}", "--profile", "demo"]
    run(*compose, "build", "api", "demo", cwd=HERE)
    context = directory / "ollama"
    context.mkdir()
    shutil.copy(HERE / "tests" / "testkit.py", context)
    (context / "Containerfile").write_text(STAND_IN_CONTAINERFILE)
    (context / "ollama").write_text(STAND_IN_PROGRAM)
    (context / "ollama").chmod(0o755)
    run("podman", "build", "--tag", STAND_IN, str(context))
    return env


# ---------------------------------------------------------------- a stack


class Stack:
    """A compose project of its own, in a copy of the files that it mounts."""

    def __init__(self, directory: Path, env: Mapping[str, str], gguf: bool, settings: Mapping[str, str]) -> None:
        self.directory, self.project = directory, f"dccapi-test-{secrets.token_hex(4)}"
        self.http, self.tls, ollama = free_port(), free_port(), free_port()
        ports = {"HTTP_PORT": str(self.http), "TLS_PORT": str(self.tls), "OLLAMA_PORT": str(ollama)}
        self.env = {**env, **ports, **settings}
        for name in ("compose.yaml", "Containerfile", "Modelfile"):
            shutil.copy(HERE / name, directory)
        (directory / "model").mkdir()
        if gguf:
            self.put_gguf()

    def put_gguf(self) -> None:
        (self.directory / "model" / GGUF).write_bytes(b"GGUF")

    async def run(self, *command: str, timeout: float = 120) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=self.directory, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        async with asyncio.timeout(timeout):
            output, _ = await process.communicate()
        return await process.wait(), output.decode()

    async def compose(self, *arguments: str) -> str:
        code, output = await self.run(sys.executable, "-m", "podman_compose", "-p", self.project, *arguments)
        assert code == 0, output
        return output

    async def podman(self, *arguments: str) -> str:
        code, output = await self.run("podman", *arguments)
        assert code == 0, output
        return output.strip()

    def container(self, service: str) -> str:
        return f"{self.project}_{service}_1"

    async def inspect(self, service: str) -> dict[str, Any]:
        code, output = await self.run("podman", "container", "inspect", self.container(service))
        assert code == 0, output
        return json.loads(output[output.index("[") :])[0]

    async def exited(self, service: str) -> tuple[int, str]:
        """Exit code and log of a service that ends."""
        code = int((await self.podman("wait", self.container(service))).split()[-1])
        return code, await self.podman("logs", self.container(service))

    async def restarted(self, service: str, killed: int) -> None:
        async with asyncio.timeout(30):
            pid = killed
            while pid in (0, killed):
                await asyncio.sleep(0.05)
                pid = (await self.inspect(service))["State"]["Pid"]

    async def answers(self, path: str, status: int, timeout: float = 120) -> Any:
        """The document at `path`, once it comes with this status."""
        answer = "no connection"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not answer.endswith(f" {status}"):
                    await asyncio.sleep(0.05)
                    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                        answer = await status_line(f"http://127.0.0.1:{self.http}{path}")
        assert answer.endswith(f" {status}"), answer
        async with self.client() as client:
            return (await client.get(path)).json()

    def client(self, tls: bool = False) -> httpx.AsyncClient:
        base = f"https://127.0.0.1:{self.tls}" if tls else f"http://127.0.0.1:{self.http}"
        return httpx.AsyncClient(
            base_url=base, http2=True, http1=False, verify=trusting_tls(), trust_env=False, timeout=120
        )

    async def badge(self, tls: bool = False) -> dict[str, Any]:
        async with self.client(tls) as client:
            response = await client.post("/generate", json=COURSE)
        assert response.status_code == 200, response.text
        assert response.http_version == "HTTP/2"
        return response.json()["response"]


@contextlib.asynccontextmanager
async def stack(directory: Path, env: Mapping[str, str], gguf: bool = True, **settings: str) -> AsyncIterator[Stack]:
    stack = Stack(directory, env, gguf, settings)
    try:
        yield stack
    except BaseException:
        for service in ("ollama", "model", "api", "demo"):
            print(f"{service}:", (await stack.run("podman", "logs", stack.container(service)))[1])
        raise
    finally:
        await stack.compose("--profile", "demo", "down", "--volumes", "--timeout", "5")


# ---------------------------------------------------------------- the image


def test_the_image_has_neither_compiler_nor_pip_cache_nor_root(images: dict[str, str]) -> None:
    look = """if True:
        import json, os, pathlib, shutil
        caches = [str(path) for top in ("/root", "/tmp", "/app", "/opt", "/var/cache", os.path.expanduser("~"))
                  for path in pathlib.Path(top).rglob("*") if path.name in ("pip", "http-v2", ".cache")]
        compilers = [name for name in ("cc", "gcc", "c++", "g++", "clang", "rustc", "ld") if shutil.which(name)]
        print(json.dumps({"uid": os.getuid(), "groups": os.getgroups(), "caches": caches, "compilers": compilers}))
    """
    for image in ("dccapi", "dccapi-demo"):
        command = ["podman", "run", "--rm", "--read-only", "--entrypoint", "/opt/venv/bin/python3"]
        command += [f"localhost/{image}:{TAG}", "-c", look]
        found = json.loads(subprocess.check_output(command, env=images, text=True))
        assert found == {"uid": 10001, "groups": [10001], "caches": [], "compilers": []}


def test_the_image_with_the_model_carries_the_licences_of_model_and_engine(images: dict[str, str]) -> None:
    look = "import pathlib; print(*(path.read_text() for path in pathlib.Path('model').glob('LICENSE.*')))"
    command = ["podman", "run", "--rm", "--entrypoint", "/opt/venv/bin/python3", f"localhost/dccapi-demo:{TAG}"]
    said = subprocess.check_output([*command, "-c", look], env=images, text=True)
    assert "Apache License" in said
    assert "The ggml authors" in said


def test_the_image_says_what_it_is_and_runs_without_a_shell(images: dict[str, str]) -> None:
    command = ["podman", "image", "inspect", f"localhost/dccapi:{TAG}"]
    image = json.loads(subprocess.check_output(command, env=images))[0]
    assert image["Labels"]["org.opencontainers.image.version"] == dccapi.__version__
    assert image["Labels"]["org.opencontainers.image.licenses"] == "MIT"
    assert image["Labels"]["org.opencontainers.image.base.name"] == BASE
    config = image["Config"]
    assert config["Entrypoint"] == ["/opt/venv/bin/python3", "dccapi.py"]
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] == "SIGTERM"
    assert image["Healthcheck"]["Test"][0] == "CMD"


async def test_the_container_may_write_only_to_tmp_and_to_its_certificates(
    images: dict[str, str], tmp_path: Path
) -> None:
    look = """if True:
        import json, pathlib
        def writable(directory):
            try:
                pathlib.Path(directory, "x").write_text("x")
            except OSError as error:
                return error.strerror
            return True
        status = dict(line.split(":\\t", 1) for line in open("/proc/1/status").read().splitlines())
        print(json.dumps({
            "writable": {directory: writable(directory) for directory in ("/", "/app", "/opt/venv", "/tmp")},
            "uids": status["Uid"].split(), "capabilities": int(status["CapEff"], 16) | int(status["CapBnd"], 16),
            "no_new_privileges": status["NoNewPrivs"], "command": open("/proc/1/cmdline").read().split("\\0")[:2],
        }))
    """
    async with stack(tmp_path, images) as it:
        await it.compose("up", "--detach", "--no-deps", "api")
        await it.answers("/livez", 200)
        found = json.loads(await it.podman("exec", it.container("api"), "/opt/venv/bin/python3", "-c", look))
        read_only = "Read-only file system"
        assert found == {
            "writable": {"/": read_only, "/app": read_only, "/opt/venv": read_only, "/tmp": True},
            "uids": ["10001"] * 4,
            "capabilities": 0,
            "no_new_privileges": "1",
            "command": ["/opt/venv/bin/python3", "dccapi.py"],
        }


# ---------------------------------------------------------------- the stack


async def test_up_makes_the_model_and_the_api_writes_badges_over_h2c_and_tls(
    images: dict[str, str], tmp_path: Path
) -> None:
    async with stack(tmp_path, images, MAX_CONCURRENT_REQUESTS="3", NUM_CTX="2048") as it:
        await it.compose("up", "--detach")
        assert (await it.exited("model"))[0] == 0
        await it.answers("/readyz", 200)
        health = await it.answers("/health", 200)
        assert (health["status"], health["model_available"], health["max_concurrent_requests"]) == ("healthy", True, 3)
        assert set(await it.badge()) == set(await it.badge(tls=True)) == {"badge_name", "badge_description", "criteria"}
        given = await it.podman("exec", it.container("ollama"), "env")
        assert {"OLLAMA_NUM_PARALLEL=3", "OLLAMA_CONTEXT_LENGTH=2048", "OLLAMA_KEEP_ALIVE=30m"} <= set(given.split())
        for service in ("api", "ollama"):
            await it.podman("healthcheck", "run", it.container(service))
        await it.compose("up", "--detach", "model")
        assert (await it.exited("model"))[0] == 0


async def test_the_health_check_fails_when_the_service_does_not_answer(images: dict[str, str], tmp_path: Path) -> None:
    async with stack(tmp_path, images) as it:
        await it.compose("up", "--detach", "--no-deps", "api")
        await it.answers("/livez", 200)
        check = ["podman", "healthcheck", "run", it.container("api")]
        assert (await it.run(*check))[0] == 0
        os.kill((await it.inspect("api"))["State"]["Pid"], signal.SIGSTOP)
        try:
            assert (await it.run(*check))[0] == 1
        finally:
            os.kill((await it.inspect("api"))["State"]["Pid"], signal.SIGCONT)


async def test_a_flood_of_resets_does_not_get_a_container_of_512_mb_killed(
    images: dict[str, str], tmp_path: Path
) -> None:
    async with stack(tmp_path, images) as it:
        await it.compose("up", "--detach", "--no-deps", "api")
        await it.answers("/livez", 200)
        before = await it.inspect("api")
        assert before["HostConfig"]["Memory"] == 512 * 2**20
        for torn in (False, True):
            await asyncio.gather(*(flood_of_resets(it.http, torn) for _ in range(50)))
        await it.answers("/livez", 200, timeout=5)
        assert "streams were reset" in await it.podman("logs", it.container("api"))  # the floods have arrived
        after = (await it.inspect("api"))["State"]
        assert (after["StartedAt"], after["OOMKilled"]) == (before["State"]["StartedAt"], False)


async def test_a_killed_engine_comes_back_and_the_api_with_it(images: dict[str, str], tmp_path: Path) -> None:
    async with stack(tmp_path, images) as it:
        await it.compose("up", "--detach")
        await it.answers("/readyz", 200)
        before = (await it.inspect("api"))["State"]["StartedAt"]
        shell = (await it.inspect("ollama"))["State"]["Pid"]
        # Its exit code says nothing: the container may have ended before podman asks for it.
        await it.run("podman", "exec", it.container("ollama"), "sh", "-c", "kill -KILL $(cat /proc/1/task/1/children)")
        await it.restarted("ollama", shell)
        await it.answers("/readyz", 200)
        await it.badge()
        assert (await it.inspect("api"))["State"]["StartedAt"] == before


async def test_without_the_gguf_everything_says_so_and_one_command_heals_it(
    images: dict[str, str], tmp_path: Path
) -> None:
    async with stack(tmp_path, images, gguf=False) as it:
        await it.compose("up", "--detach")
        code, said = await it.exited("model")
        assert code != 0
        assert f"./model/{GGUF} is missing" in said
        problem = await it.answers("/readyz", 503)
        assert problem["error_code"] == "model_missing"
        assert "phi4badges" in problem["detail"]
        health = await it.answers("/health", 503)
        assert (health["status"], health["model_available"]) == ("unhealthy", False)
        assert "phi4badges" in health["error"]
        started = (await it.inspect("api"))["State"]["StartedAt"]
        it.put_gguf()
        await it.compose("up", "--detach", "model")
        await it.answers("/readyz", 200)
        await it.badge()
        assert (await it.inspect("api"))["State"]["StartedAt"] == started
        # What Ollama has, it needs no file for.
        (it.directory / "model" / GGUF).unlink()
        await it.compose("up", "--detach", "model")
        assert (await it.exited("model"))[0] == 0


@pytest.mark.parametrize(("drain_timeout", "last"), [("30", "final"), ("1", "error")])
async def test_down_lets_a_running_generation_end(
    images: dict[str, str], tmp_path: Path, drain_timeout: str, last: str
) -> None:
    async with stack(tmp_path, images, DRAIN_TIMEOUT=drain_timeout) as it:
        await it.compose("up", "--detach")
        await it.answers("/readyz", 200)
        down: list[asyncio.Task[Any]] = []
        events = []
        async with (
            it.client() as client,
            client.stream("POST", "/generate/stream?accumulated=false", json=SLOW_COURSE) as response,
        ):
            async for event in parse_sse(response.aiter_bytes()):
                events.append(event)
                if event.get("event") == "message" and not down:
                    down = [asyncio.create_task(it.exited("api")), asyncio.create_task(it.compose("down"))]
        (code, _), _ = await asyncio.gather(*down)
        data = events[-1]["data"]
        assert data["type"] == last, data
        assert data.get("error_code") == (None if last == "final" else "shutting_down")
        assert code == 0


async def test_the_operators_own_certificate_is_served(images: dict[str, str], tmp_path: Path) -> None:
    certs = tmp_path / "certs"
    certs.mkdir()
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    issued.private_key_pem.write_to_path(certs / "key.pem")
    for blob in issued.cert_chain_pems:
        blob.write_to_path(certs / "cert.pem", append=True)
    (certs / "key.pem").chmod(0o444)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with stack(tmp_path, images, CERTS="./certs") as it:
        await it.compose("up", "--detach", "--no-deps", "api")
        # It also starts without any engine.
        assert (await it.answers("/readyz", 503))["error_code"] == "engine_unreachable"
        async with httpx.AsyncClient(http2=True, verify=trusting, trust_env=False) as client:
            response = await client.get(f"https://127.0.0.1:{it.tls}/livez")
        assert (response.status_code, response.http_version) == (200, "HTTP/2")


async def test_the_demo_profile_writes_a_badge_with_the_model_in_its_image(
    images: dict[str, str], tmp_path: Path
) -> None:
    async with stack(tmp_path, images, gguf=False) as it:
        await it.compose("--profile", "demo", "up", "--detach", "demo")
        await it.answers("/readyz", 200, timeout=120)
        badge = await it.badge(tls=True)
        assert all(badge[name] for name in ("badge_name", "badge_description"))
        assert badge["criteria"]["narrative"]
        running = await it.podman("ps", "--format={{.Names}}", f"--filter=label=io.podman.compose.project={it.project}")
        assert running.split() == [it.container("demo")]
        await it.podman("stop", "--time", "60", it.container("demo"))
        assert (await it.inspect("demo"))["State"]["ExitCode"] == 0


# ---------------------------------------------------------------- the files


def test_the_compose_files_keep_to_what_podman_and_docker_both_take() -> None:
    command = [sys.executable, "-m", "podman_compose", "--profile=demo", "-f", "compose.yaml", "-f", "compose.gpu.yaml"]
    env = {name: os.environ[name] for name in ("PATH", "HOME")}
    config = subprocess.check_output([*command, "config"], cwd=HERE, env=env, text=True)
    assert re.findall(r"^ +image: (.*)$", config, re.M) == [
        "localhost/dccapi:latest",
        "localhost/dccapi-demo:latest",
        "docker.io/ollama/ollama:0.24.0",
        "docker.io/ollama/ollama:0.24.0",
    ]
    assert "nvidia.com/gpu=all" in config
    assert "127.0.0.1:8000:11434" in config
    assert "$$" not in config
