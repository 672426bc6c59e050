"""What is wrong with a request is said once, with the right status, and leaves nothing behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .conftest import Deployment


def refused(pd: Deployment, status: int, path: str = "/v1/completions", **kwargs: Any) -> dict[str, Any]:
    answer = pd.client.request("POST", path, timeout=30, **kwargs)
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["message"]
    assert error["type"]
    pd.wait_idle()
    return error


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_longer_than_the_model_takes(pd: Deployment, stream: bool) -> None:
    body = {"model": pd.client.model, "prompt": [11] * 4200, "max_tokens": 4, "stream": stream}
    error = refused(pd, 400, json=body)
    assert "4096" in error["message"]


@pytest.mark.parametrize("content", [b'{"prompt": "a', b"", b"[1, 2]", b"\xff\xfe", b'{"prompt": null}'])
def test_malformed_body(pd: Deployment, content: bytes) -> None:
    refused(pd, 400, content=content, headers={"Content-Type": "application/json"})


def test_messages_of_the_wrong_type(pd: Deployment) -> None:
    refused(pd, 400, "/v1/chat/completions", json={"model": pd.client.model, "messages": "hello"})


def test_unknown_model(pd: Deployment) -> None:
    error = refused(pd, 404, json={"model": "no-such-model", "prompt": "a"})
    assert "no-such-model" in error["message"]


def test_the_next_request_is_served(pd: Deployment) -> None:
    prompt = pd.ids(30)
    assert pd.client.complete(prompt, max_tokens=4).token_ids == pd.reference(prompt, max_tokens=4).token_ids
