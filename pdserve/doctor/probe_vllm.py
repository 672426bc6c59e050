"""Run as a child: imports vLLM and asks its own factory for our connector, as an engine does. One line of JSON."""

from __future__ import annotations

import json
import time
from typing import Any


def look() -> dict[str, Any]:
    begun = time.monotonic()
    try:
        import vllm
        from vllm.config import KVTransferConfig
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    except Exception as error:  # noqa: BLE001 - whatever an import of half the world throws is the answer
        return {"version": "", "import_error": f"{type(error).__name__}: {error}", "connector_error": ""}
    connector_error = ""
    try:
        config = KVTransferConfig(
            kv_connector="PdserveConnector",
            kv_connector_module_path="pdserve.engines.vllm.connector",
            kv_role="kv_both",
        )
        found = KVConnectorFactory.get_connector_class(config)
        if found.__abstractmethods__:
            connector_error = f"{found.__name__} lacks {', '.join(sorted(found.__abstractmethods__))}"
    except Exception as error:  # noqa: BLE001 - as above
        connector_error = f"{type(error).__name__}: {error}"
    seconds = round(time.monotonic() - begun, 1)
    return {
        "version": vllm.__version__,
        "import_error": "",
        "connector_error": connector_error,
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(look()))
