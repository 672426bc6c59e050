"""How the engine without a model is started; for dry runs of a whole deployment. Fits `Command` in engines/base.py."""

from __future__ import annotations

from pathlib import Path

from pdserve.launching import Context
from pdserve.topology import Instance


def argv(instance: Instance, context: Context) -> list[str]:
    command = [context.python, "-P", "-m", "pdserve.engines.fake.server", "--model", context.served_model_name]
    command += ["--host", instance.host, "--port", str(instance.port)]
    if instance.engine.max_model_len is not None:
        command += ["--max-model-len", str(instance.engine.max_model_len)]
    return [*command, *instance.engine.extra_args]


def environment(instance: Instance, context: Context) -> dict[str, str]:
    return {"PYTHONSAFEPATH": "1"} | instance.engine.env


def sockets_folder(instance: Instance, context: Context) -> Path | None:
    return None


def ready_url(instance: Instance, context: Context) -> str:
    return f"{instance.url}/health"
