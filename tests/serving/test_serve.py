"""A server on the loopback address, and OpenAI's client against it."""

import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Run
from talking import expected

MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]
ASKED = {"temperature": 0, "max_tokens": 8}


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("localhost", 0))
        return int(tried.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://localhost:{port}/health").close()
    except urllib.error.URLError:
        return False
    return True


@pytest.fixture(scope="module")
def client(talker: Path) -> Iterator[Any]:
    """A client of a server that runs in a process of its own; interrupted, it ends in peace."""
    openai = pytest.importorskip("openai")
    for needed in ("fastapi", "uvicorn"):
        pytest.importorskip(needed)
    port = free_port()
    command = [sys.executable, "-m", "flexigpt", "serve", str(talker), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            until = time.monotonic() + 240  # a busy machine loads torch for a minute
            while not _answers(port):
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < until, "the server does not answer"
                time.sleep(0.1)
            with openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0) as made:
                yield made
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0  # a busy machine
            assert server.stderr is not None
            (told,) = server.stderr.read().splitlines()
            assert told.startswith(f"once loaded, {talker} is served by this name at http://localhost:{port}/v1;")
            assert server.stdout is not None
            assert not server.stdout.read()
        finally:
            server.kill()


def test_openais_client_chats_with_a_compact_model(client: Any, talker: Path) -> None:
    made = client.chat.completions.create(model=str(talker), messages=MESSAGES, **ASKED)
    assert made.choices[0].message.content == expected(talker, "user: Hello\nassistant:", 8)
    assert made.choices[0].finish_reason == "length"


def test_it_streams(client: Any, talker: Path) -> None:
    parts = client.chat.completions.create(model=str(talker), messages=MESSAGES, stream=True, **ASKED)
    pieces = [choice.delta.content for part in parts for choice in part.choices if choice.delta.content]
    assert len(pieces) > 1
    assert "".join(pieces) == expected(talker, "user: Hello\nassistant:", 8)


def test_it_completes_a_prompt(client: Any, talker: Path) -> None:
    made = client.completions.create(model=str(talker), prompt="It was a dark", **ASKED)
    assert made.choices[0].text == expected(talker, "It was a dark", 8)


def test_a_taken_port_is_one_line(run: Run, tiny_compact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexigpt.serving.server.is_serve_available", lambda: True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, printed, errors = run("serve", tiny_compact, "--host", "127.0.0.1", "--port", port)
    assert (code, printed) == (2, "")
    assert errors == f"flexigpt: --host 127.0.0.1 --port {port} cannot be listened at: Address already in use\n"


def test_missing_packages_are_one_line(run: Run, tiny_compact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexigpt.serving.server.is_serve_available", lambda: False)
    code, printed, errors = run("serve", tiny_compact)
    assert (code, printed) == (2, "")
    assert errors == "flexigpt: serving needs more packages: pip install 'flexigpt[serve]'\n"


def test_damaged_weights_are_one_line_before_the_address_is_told(
    run: Run, tiny_compact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexigpt.serving.server.is_serve_available", lambda: True)
    damaged = Path(shutil.copytree(tiny_compact, tmp_path / "damaged"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, printed, errors = run("serve", damaged)
    assert (code, printed, errors.count("\n")) == (2, "", 1)
    assert "damaged" in errors
