"""The two engines behind a router that nobody here wrote: vllm-router in nixl mode."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ports import free_port

from pdserve.openai_client import Client

from .conftest import wait_for

if TYPE_CHECKING:
    from .conftest import Deployment


@pytest.fixture
def router(pd: Deployment, tmp_path: Path) -> Iterator[Client]:
    binary = Path(sys.executable).parent / "vllm-router"
    if not binary.exists():
        pytest.skip("vllm-router is not installed (extra: dev)")
    port = free_port()
    command = [str(binary), "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    command += ["--vllm-pd-disaggregation", "--kv-connector", "nixl", "--policy", "round_robin"]
    command += ["--prefill", pd.target.engines["prefill"][0], "--decode", pd.target.engines["decode"][0]]
    log = tmp_path / "router.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        with Client(f"http://127.0.0.1:{port}", model=pd.client.model, timeout=120) as client:
            wait_for(client.healthy, 120, "vllm-router was not ready", log)
            yield client
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(15)


def test_same_tokens_and_same_hits(pd: Deployment, router: Client) -> None:
    for length in (17, 513, 900):
        prompt = pd.ids(length)
        whole = (length - 1) // 256 * 256
        expected = pd.reference(prompt, max_tokens=10)
        before = pd.retrieved("decode")
        cold = router.complete(prompt, max_tokens=10)
        handed_over = pd.retrieved("decode") - before
        pd.wait_idle()
        pd.forget()
        before = pd.retrieved("prefill")
        warm = router.complete(prompt, max_tokens=10)
        assert cold.token_ids == warm.token_ids == expected.token_ids
        assert handed_over >= whole
        assert pd.retrieved("prefill") - before >= whole
        # A prompt that the router brought in is hit through our proxy, too.
        pd.wait_idle()
        pd.forget()
        before = pd.retrieved("prefill")
        assert pd.client.complete(prompt, max_tokens=10).token_ids == expected.token_ids
        assert pd.retrieved("prefill") - before >= whole
    pd.wait_idle()


def test_a_chat_through_the_router(pd: Deployment, router: Client) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert pd.plain.reset_prefix_cache()
    expected = pd.plain.chat(messages, max_tokens=12)
    assert router.chat(messages, max_tokens=12).token_ids == expected.token_ids
