"""What pdserve asks of an engine, as two Protocols. An engine's modules satisfy them with plain functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pdserve.engines.body import Body

if TYPE_CHECKING:
    from pathlib import Path

    from pdserve.launching import Context
    from pdserve.topology import Instance


class First(Protocol):
    """A first token: what of its text is shown at once and what is kept back, and the events for the client, ids included,
    which are the whole answer where it is `over`."""

    @property
    def token(self) -> int: ...
    @property
    def shown(self) -> str: ...
    @property
    def hidden(self) -> str: ...
    @property
    def events(self) -> bytes: ...
    @property
    def over(self) -> bool: ...


class Dialect(Protocol):
    """How a request is split into a prefill leg and a decode leg. Pure: bytes in, bytes out, no I/O, no state.

    Everything returns body *bytes*. Re-encoding JSON could reorder keys or change the spelling of the prompt, and with
    it the prompt's tokens: a request then misses the cache that the same request filled.

    `endpoint` is the path, "/v1/completions" or "/v1/chat/completions". `body` has been parsed and is a JSON object;
    its fields may still have any type, and a wrong type must not raise: the engine itself tells the client.
    """

    def early_handover(self, seconds: float) -> bytes | None:
        """What a decode leg carries that is sent while its prefill is still under way, for `seconds` at most; None if such a
        leg would not wait in the engine."""

    def why_local(self, endpoint: str, body: Body) -> str | None:
        """A reason why this request cannot be split (a word for logs and headers), or None if it can."""

    def prefill_body(self, endpoint: str, body: Body, push_to: str = "", ids: bool = False) -> bytes:
        """The client's body changed so that the engine computes the prompt, hands its KV over and produces one token.
        Nothing the client asked of the *answer* may make this leg fail. `push_to` names the host that the KV is for, where
        it is another one; `ids` asks for the token ids of the prompt."""

    def read_handover(self, reply: bytes) -> bytes | None:
        """The JSON that the decode leg must carry, byte for byte as the prefill reply has it; None if there is none.
        Raises ValueError if the reply is not what the engine sends."""

    def decode_body(self, endpoint: str, body: Body, handover: bytes | None, ids: bool = False) -> bytes:
        """The client's own body plus the handover. Without a handover and without fields that only the proxy may set,
        the very bytes of the client. `ids` asks for the token ids of prompt and answer too."""

    def cached_tokens(self, handover: bytes) -> int | None:
        """How much of the prompt the producer did not have to compute; None if the handover does not say."""

    def handed(self, handover: bytes) -> dict[str, Any] | None:
        """Where the producer's prompt came from, if the handover says: {"cached": {tier: tokens}, "load_ms": milliseconds or
        None, "saved_ms": the same, "load_reason": why it was loaded or not, "" if nothing was found}."""

    def may_begin(self, endpoint: str, body: Body) -> bool:
        """The stream of this request can be begun by the producer's own first token, whatever that will be."""

    def first(self, endpoint: str, body: Body, reply: bytes, handover: bytes) -> First | None:
        """The beginning of such a stream, from the reply to its prefill leg; None: the consumer has to begin it."""

    def prompt_tokens(self, reply: bytes) -> int | None:
        """How long the prompt of this answer was, if its usage says so."""

    def tell_cached(self, data: bytes, tokens: int) -> bytes:
        """An answer, or whole events of one, with `tokens` as the number of cached tokens where it tells any. No other
        byte is changed."""


    # Carrying a stream on after its engine died; proxy/takeover.py tells the story.

    @property
    def RESUME_PATH(self) -> str:
        """Where resume_body is sent."""

    def resumable(self, endpoint: str, body: Body) -> bool:
        """The tokens so far say everything about where a stream of this request is."""

    def repeatable(self, endpoint: str, body: Body) -> bool:
        """Asked once more, the request gives the same answer."""

    def greedy(self, body: Body) -> bool:
        """No chance is involved in choosing tokens."""

    def counts_apart(self, body: Body) -> bool:
        """Generated tokens are treated otherwise than the prompt's, so that moving them there changes what follows."""

    def held_back(self, body: Body) -> int:
        """Characters at the end of what is generated that a running stream has not been given yet."""

    def stop_strings(self, body: Body) -> tuple[Sequence[str], bool, int]:
        """The strings that end the answer, whether they stay in its text, and the number of tokens before which none counts."""

    def detokenize(self, body: Body, ids: Sequence[int]) -> tuple[bytes, bytes]:
        """A path and a body: the question what these tokens say."""

    def detokenized(self, reply: bytes) -> str | None:
        """The answer to it; None if it is none."""

    def plain_questions(self, endpoint: str, body: Body, text: str) -> list[tuple[bytes, bytes]] | None:
        """Where an endpoint tells no token ids, two questions: which tokens is the prompt of this request, and which are
        `text`? None if only the endpoint itself can say."""

    def tokens(self, reply: bytes) -> list[int] | None:
        """The answer to one of them; None if it is none."""

    def as_completion(self, endpoint: str, body: Body) -> Body | None:
        """What a request to another endpoint asks of its answer, as a completion's fields."""

    def hide_ids(self, data: bytes) -> bytes:
        """Whole events as they would be if no token ids had been asked for."""

    def resume_body(
        self, endpoint: str, body: Body, prompt_ids: bytes, ids: Sequence[int], without: Sequence[str] = ()
    ) -> bytes:
        """A streamed request that goes on behind the tokens `ids` of the answer; `prompt_ids` is a JSON list. `without`:
        fields of the client's that are left out."""


class Command(Protocol):
    """How an engine process is started. Pure: topology in, words out."""

    def argv(self, instance: Instance, context: Context) -> list[str]:
        """The command line."""

    def environment(self, instance: Instance, context: Context) -> dict[str, str]:
        """The variables to add to the environment."""

    def sockets_folder(self, instance: Instance, context: Context) -> Path | None:
        """A folder that must be there before it starts and goes when it has ended; None: it needs none."""

    def ready_url(self, instance: Instance, context: Context) -> str:
        """Answers 200 once the engine can serve."""
