from __future__ import annotations

import asyncio
import signal
import socket
import sys
from typing import Any

import httpx
import pytest
from ports import free_port

from pdserve.engines.fake.server import FakeEngine, Fault
from pdserve.errors import ConfigError
from pdserve.proxy.app import _bind

pytestmark = pytest.mark.anyio

START = (
    "import argparse, sys; from pdserve.proxy import app; p = argparse.ArgumentParser(); app.add_arguments(p); "
    "sys.exit(app.main(p.parse_args()))"
)


async def answers(url: str) -> bool:
    try:
        async with httpx.AsyncClient(verify=False) as client:
            return (await client.get(url)).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_process_starts_serves_and_stops_in_order(number: signal.Signals, until: Any) -> None:
    async with FakeEngine(gap=0.02) as engine:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        words = ["--port", str(port), "--both", engine.url, "--model", "fake", "--shutdown-timeout", "5"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", START, *words, stderr=asyncio.subprocess.PIPE
        )
        try:
            async with asyncio.timeout(120):
                while not await answers(url + "/health"):
                    assert process.returncode is None
                    await asyncio.sleep(0.05)
            async with httpx.AsyncClient(verify=False, timeout=20) as client:
                body = {"model": "fake", "prompt": "a", "stream": True, "max_tokens": 10}
                running = asyncio.create_task(client.post(url + "/v1/completions", json=body))
                await until(lambda: len(engine.seen) == 1)
                process.send_signal(number)
                assert (await running).text.endswith("data: [DONE]\n\n")
            async with asyncio.timeout(60):
                _, said = await process.communicate()
            assert (process.returncode, b"Traceback" in said) == (0, False), said.decode()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def test_a_stop_does_not_wait_for_ever_for_a_stream(rig: Any, quick: Any, until: Any) -> None:
    async with rig(producers=0, deadlines=quick(shutdown=1, event=60)) as r:
        r.d.always = Fault("mute", after=1)
        reader, writer = await r.open("/v1/completions", {"prompt": "a", "stream": True})
        await reader.readuntil(b"data: ")
        async with asyncio.timeout(60):
            await r.server.shutdown()
            told = (await reader.readuntil(b"data: [DONE]")).decode()
        writer.close()
        assert "The proxy is stopping." in told
        await until(lambda: r.d.seen[0].aborted)


def test_a_port_in_use_is_a_config_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="cannot listen on") as error:
            _bind("127.0.0.1", taken.getsockname()[1])
        assert error.value.exit_code == 2
