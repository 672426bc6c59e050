"""The engine forgets: its prefix cache is emptied, or it sleeps and wakes up. Answers stay right, and nothing of before is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdserve.openai_client import Client

if TYPE_CHECKING:
    from .conftest import Deployment


def engine_post(both: Deployment, path: str) -> None:
    (url,) = both.target.engines["both"]
    with Client(url) as engine:
        answer = engine.request("POST", path, timeout=60)
        assert answer.status_code == 200, answer.text


def test_emptied_and_loaded_again_within_one_engine(both: Deployment) -> None:
    """The engine's own cache only: ours still hits, and brings back the very blocks that are gone."""
    prompt = both.ids(700)
    expected = both.reference(prompt, max_tokens=8)
    for _ in range(2):
        both.client.complete(prompt, max_tokens=8)
        both.wait_idle()
        both.forget()
        before = both.retrieved("both")
        assert both.client.complete(prompt, max_tokens=8).token_ids == expected.token_ids
        assert both.retrieved("both") - before >= 512
        both.wait_idle()


def test_a_reset_that_includes_the_connector_and_a_sleep_use_nothing_of_before(both: Deployment) -> None:
    """vLLM does this when weights change: KV of before would give wrong answers. (On a CPU sleeping frees nothing, but the caches.)"""
    prompt = both.ids(700)
    expected = both.reference(prompt, max_tokens=8)
    for paths in (["/reset_prefix_cache?reset_external=true"], ["/sleep?level=1", "/wake_up"]):
        both.client.complete(prompt, max_tokens=2)
        both.wait_idle()
        both.forget()  # succeeds once no block is held any more; else vLLM would refuse what follows
        for path in paths:
            engine_post(both, path)
        before = both.retrieved("both")
        assert both.client.complete(prompt, max_tokens=8).token_ids == expected.token_ids
        assert both.retrieved("both") == before, "KV of before the reset was used"
        both.wait_idle()
        both.forget()
        assert both.client.complete(prompt, max_tokens=8).token_ids == expected.token_ids
        assert both.retrieved("both") - before >= 512  # stored anew, and hit
        both.wait_idle()
