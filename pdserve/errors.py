"""Every error that pdserve raises on purpose.

PdserveError
|-- ConfigError          the user's YAML, flag or environment; exit code 2, nothing was started
|-- StartError           a process could not be brought up; exit code 1
|-- NotRunning           what a command should talk to does not run or does not answer; exit code 3
|-- RequestError         the client's request is wrong; carries the HTTP status and the OpenAI error type
|-- UpstreamError        an engine refused, broke or was late; carries the HTTP status to answer with
|-- CacheError           the cache cannot do what was asked; callers treat it as a miss
|   |-- CacheUnavailable     no daemon, or it did not answer before the deadline
|   |-- CacheFull            no space could be reserved
|   `-- ProtocolError        the peer speaks another version or sent a malformed frame
`-- UnsupportedError     a model, engine version or setting that pdserve refuses, with the reason
"""

from __future__ import annotations


class PdserveError(Exception):
    """Base of all; `exit_code` is what a command ends with when it is not handled."""

    exit_code = 1


class ConfigError(PdserveError):
    """A wrong setting. `key` is the path to it (`decode[1].port`), `fix` a sentence that says what to do."""

    exit_code = 2

    def __init__(self, key: str, problem: str, fix: str = "") -> None:
        self.key, self.problem, self.fix = key, problem, fix
        text = f"{key}: {problem}" if key else problem
        super().__init__(f"{text}. {fix}" if fix else text)


class StartError(PdserveError):
    """A process of the deployment could not be started or did not become ready."""


class NotRunning(PdserveError):
    """What a command should talk to does not run, or does not answer."""

    exit_code = 3


class RequestError(PdserveError):
    """The client's fault: answered with `status` and an OpenAI-shaped body."""

    def __init__(
        self,
        status: int,
        message: str,
        type_: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ):
        self.status, self.message, self.type, self.param, self.code = status, message, type_, param, code
        super().__init__(message)


class UpstreamError(PdserveError):
    """An engine's fault. `status` is what the client is told; `body` the engine's own JSON when it sent one."""

    def __init__(self, status: int, message: str, instance: str = "", body: bytes = b"") -> None:
        self.status, self.message, self.instance, self.body = status, message, instance, body
        super().__init__(f"{instance}: {message}" if instance else message)


class CacheError(PdserveError):
    """The cache could not serve; the caller computes instead."""


class CacheUnavailable(CacheError):
    """There is no daemon, or it did not answer in time."""


class CacheFull(CacheError):
    """No space could be reserved even after eviction."""


class ProtocolError(CacheError):
    """A frame that this version does not understand, or that breaks a bound."""


class UnsupportedError(PdserveError):
    """A setup that pdserve refuses at start; the message names what and why."""

    exit_code = 2
