"""Run as a child: which RDMA libraries import here, and their versions, as one line of JSON. Loading them may print, or crash."""

from __future__ import annotations

import importlib
import importlib.util
import json

NAMES = ("ucxx", "nixl")


def look() -> dict[str, dict[str, str]]:
    """Installed libraries alone: {name: {"version": ..., "error": ...}}."""
    found = {}
    for name in NAMES:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            module = importlib.import_module(name)
            version = (
                ".".join(map(str, module.get_ucx_version())) if name == "ucxx" else getattr(module, "__version__", "")
            )
            found[name] = {"version": version, "error": ""}
        except Exception as error:  # noqa: BLE001 - a library that does not load is the answer
            found[name] = {"version": "", "error": f"{type(error).__name__}: {error}"}
    return found


if __name__ == "__main__":
    print(json.dumps(look()))
