"""Which way imports go: what keeps the parts apart, checked on the source of every file (nothing is imported for it)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"transfer": "transfer", "kernels": "kernels", "proxy": "proxy", "deploy": "deploy"}

# What a file may import beside the standard library, by the longest prefix of its module name. A name covers everything
# below it; "core" stands for pdserve's small typed centre.
CORE = "core"
WEB = ("fastapi", "starlette", "uvicorn", "uvloop", "httptools", "httpx")
RULES: dict[str, tuple[str, ...]] = {
    "pdserve": (CORE, "msgspec", "yaml", "prometheus_client", "blake3"),
    # Tools that drive a running deployment from outside, over HTTP and by the command.
    "pdserve.bench": (CORE, "pdserve.bench", "httpx", "httptools", "msgspec", "yaml", "psutil", "rich", "numpy"),
    "pdserve.bench.report": (CORE, "pdserve.bench", "matplotlib", "msgspec", "yaml"),
    "pdserve.bench.size": (CORE, "pdserve.bench", "pdserve.transfer.eviction", "msgspec", "numpy"),
    "pdserve.cli_size": (CORE, "pdserve.bench", "msgspec"),
    "pdserve.verify": (CORE, "rich", "yaml", "httpx"),
    "pdserve.demo": (CORE, "rich", "yaml", "httpx"),
    "pdserve.target": (CORE, "yaml", "httpx"),
    "pdserve.compare": (CORE,),
    "pdserve.openai_client": (CORE, "httpx", "prometheus_client"),
    "pdserve.model_smollm2": (CORE, "numpy", "gguf", "tokenizers"),
    # The command: one module per word, each imported when its word is given.
    "pdserve.cli_cache": (CORE, "msgspec", "pdserve.transfer.serving", "pdserve.transfer.fsck"),
    "pdserve.cli_launch": (CORE, "pdserve.deploy", "msgspec", "yaml"),
    "pdserve.cli_tree": (CORE,),
    "pdserve.cli_completion": (CORE, "pdserve.cli_tree", "shtab"),
    "pdserve.cli_topology": (CORE, "msgspec"),
    "pdserve.cli_reference": (CORE, "pdserve.cli_tree"),
    "pdserve.output": (CORE, "rich"),
    "pdserve.cli_doctor": (CORE, "pdserve.doctor"),
    # Looks at every part from outside; the two children of it that import an engine or a driver do nothing else.
    "pdserve.doctor": (CORE, "pdserve.doctor", "pdserve.deploy", "pdserve.kernels", "pdserve.transfer.tiers", "numpy", "rich"),
    "pdserve.doctor.memory": (CORE, "pdserve.doctor", "pdserve.deploy", "pdserve.transfer.arena"),
    "pdserve.doctor.probe_vllm": ("vllm",),
    "pdserve.doctor.probe_ucx": (),
    "pdserve.__main__": (CORE, "pdserve.cli_tree"),
    "pdserve.cli_status": (CORE, "pdserve.deploy", "msgspec", "rich"),
    "pdserve.cli_stop": (CORE, "pdserve.cli_status", "pdserve.deploy"),
    "pdserve.trace": (CORE, "opentelemetry"),
    "pdserve.cli_logs": (CORE, "pdserve.deploy"),
    "pdserve.cli_explain": (CORE, "pdserve.deploy", "httpx"),
    "pdserve.marks": (CORE, "blake3", "numpy"),
    "pdserve.engines.vllm.facts": (CORE, "pdserve.transfer.telling", "pdserve.transfer.wire"),
    "pdserve.chunk": (CORE, "blake3", "msgspec", "numpy"),
    "pdserve.engines": (CORE, "msgspec"),
    "pdserve.engines.fake": (CORE, "httptools", "uvloop"),
    # The three that run inside vLLM; the dialect and the command beside them do not.
    "pdserve.engines.vllm": (CORE, "msgspec"),
    "pdserve.engines.vllm.detokenizing": (CORE, "tokenizers"),
    "pdserve.engines.vllm.naps": (CORE, "vllm"),
    "pdserve.engines.vllm.connector": (CORE, "pdserve.transfer", "vllm", "torch"),
    "pdserve.engines.vllm.scheduler_side": (CORE, "pdserve.transfer", "vllm"),
    "pdserve.engines.vllm.worker_side": (CORE, "pdserve.transfer", "vllm"),
    "pdserve.engines.vllm.finding": (CORE, "pdserve.transfer"),
    "pdserve.engines.vllm.loading": (CORE, "pdserve.transfer"),
    "pdserve.engines.vllm.copier": (CORE, "pdserve.transfer"),
    "pdserve.engines.vllm.parts": (CORE, "pdserve.transfer"),
    "pdserve.engines.vllm.quick": (CORE, "pdserve.kernels", "torch"),
    "pdserve.engines.vllm.stages": (CORE, "pdserve.transfer.wire", "vllm"),
    "pdserve.engines.vllm.saving": (CORE, "pdserve.transfer", "numpy"),
    "pdserve.engines.vllm.stats": (CORE, "vllm", "prometheus_client"),
    "pdserve.engines.vllm.device_layout": (CORE, "pdserve.transfer.staging", "pdserve.kernels", "vllm", "torch"),
    "pdserve.engines.vllm.layout": (
        CORE, "pdserve.transfer.staging", "pdserve.transfer.staging_host", "vllm", "torch", "numpy", "huggingface_hub",
    ),
    "pdserve.engines.vllm.messages": (CORE, "vllm"),
    "pdserve.engines.vllm.tracked": (CORE, "pdserve.transfer.wire"),
    "pdserve.transfer": (CORE, "pdserve.transfer", "blake3", "msgspec", "numpy", "prometheus_client", "uvloop"),
    "pdserve.transfer.daemon": (CORE, "pdserve.transfer", "msgspec", "numpy", "prometheus_client", *WEB),
    "pdserve.transfer.serving": (CORE, "pdserve.transfer", *WEB),
    "pdserve.transfer.admin": (CORE, "pdserve.transfer", "prometheus_client", "pydantic", *WEB),
    # Kept chunks are checked by their digest, and kernels says what a digest is.
    "pdserve.transfer.tiering": (CORE, "pdserve.transfer", "pdserve.kernels", "msgspec", "numpy", "prometheus_client"),
    "pdserve.transfer.scrub": (CORE, "pdserve.transfer", "pdserve.kernels", "numpy"),
    "pdserve.transfer.fsck": (CORE, "pdserve.transfer", "pdserve.kernels", "msgspec", "numpy", "rich"),
    "pdserve.transfer.tiers": (CORE, "pdserve.transfer", "pdserve.kernels", "blake3", "msgspec", "numpy"),
    "pdserve.transfer.peers": (CORE, "pdserve.transfer", "msgspec", "numpy"),
    "pdserve.transfer.peers.sources": (CORE, "msgspec", "httpx"),  # etcd's HTTP gateway
    "pdserve.transfer.transports": (CORE, "pdserve.transfer.transports", "pdserve.kernels", "msgspec", "numpy"),
    "pdserve.transfer.transports.ucx": (CORE, "pdserve.transfer.transports", "pdserve.kernels", "msgspec", "numpy"),
    "pdserve.transfer.transports.ucx_library": (CORE, "pdserve.transfer.transports", "ucp", "ucxx"),
    "pdserve.transfer.transports.nixl": (CORE, "pdserve.transfer.transports", "msgspec", "numpy", "nixl_cu12", "nixl_cu13"),
    "pdserve.transfer.staging_host": (CORE, "pdserve.transfer", "pdserve.kernels", "numpy"),
    "pdserve.transfer.staging": (CORE, "pdserve.transfer", "pdserve.kernels", "torch", "numpy"),
    "pdserve.kernels": ("pdserve.kernels", "torch", "numpy"),
    "pdserve.proxy": (CORE, "pdserve.proxy", "msgspec", "prometheus_client", *WEB),
    "pdserve.deploy.backends.ray": (CORE, "pdserve.deploy", "ray"),
    "pdserve.deploy": (CORE, "pdserve.deploy", "msgspec", "psutil", "rich", "httpx"),
}
# The centre itself: everything directly under pdserve that is not listed above, and what an engine tells about itself.
CORE_PREFIXES = (
    "pdserve.engines",
    "pdserve.engines.vllm.command",
    "pdserve.engines.vllm.dialect",
    "pdserve.engines.vllm.versions",
)
APART = (
    "pdserve.transfer",
    "pdserve.kernels",
    "pdserve.proxy",
    "pdserve.deploy",
    "pdserve.engines.vllm.connector",
    "pdserve.doctor",
    "pdserve.cli_",
)


def modules() -> Iterator[tuple[str, Path]]:
    for file in sorted((ROOT / "pdserve").rglob("*.py")):
        yield (
            ".".join(("pdserve", *file.relative_to(ROOT / "pdserve").with_suffix("").parts)).removesuffix(".__init__"),
            file,
        )
    for part in PARTS:
        for file in sorted((ROOT / part).rglob("*.py")):
            name = ".".join(("pdserve", part, *file.relative_to(ROOT / part).with_suffix("").parts))
            yield name.removesuffix(".__init__"), file


def imports(file: Path, package: str = "pdserve") -> Iterator[tuple[int, str]]:
    """Every imported module, also those inside functions; what only the type checker sees is free."""
    tree = ast.parse(file.read_text())
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            here = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*here, *filter(None, [node.module])])
            # `from pdserve.deploy import state` names a module below; `from msgspec import Meta` does not.
            below = [f"{base}.{name.name}" for name in node.names] if base.startswith("pdserve") else [base]
            for name in below:
                yield node.lineno, name


def is_core(name: str) -> bool:
    if name.startswith(CORE_PREFIXES) and not name.startswith(APART):
        return True
    return name.startswith("pdserve") and not name.startswith(APART)


def allowed(module: str, name: str) -> bool:
    if name.split(".")[0] in sys.stdlib_module_names:
        return True
    rule = RULES[max((prefix for prefix in RULES if below(module, prefix)), key=len)]
    if is_core(name):
        return CORE in rule
    return any(below(name, permitted) for permitted in rule if permitted != CORE)


def below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


ALL = list(modules())


@pytest.mark.parametrize(("module", "file"), ALL, ids=[name for name, _ in ALL])
def test_imports_go_the_right_way(module: str, file: Path) -> None:
    if module == "pdserve.__main__":
        return  # names the parts as text and imports the one that is asked for
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found = imports(file, package)
    wrong = [f"{file}:{line} {module} imports {name}" for line, name in found if not allowed(module, name)]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_imported_by_its_folder_at_the_top() -> None:
    """`import kernels` would find another project's package; ours is pdserve.kernels."""
    wrong = [f"{f}:{line}" for _, f in ALL for line, name in imports(f) if name.split(".")[0] in PARTS]
    assert not wrong


def test_the_table_itself_bites() -> None:
    assert not allowed("pdserve.proxy.split", "torch")
    assert not allowed("pdserve.proxy.split", "pdserve.transfer.client")
    assert not allowed("pdserve.deploy.plan", "pdserve.proxy.options")
    assert not allowed("pdserve.transfer.store", "pdserve.kernels")
    assert not allowed("pdserve.kernels.reference", "pdserve.errors")
    assert not allowed("pdserve.topology", "pdserve.deploy.plan")
    assert not allowed("pdserve.engines.vllm.command", "vllm")
    assert allowed("pdserve.engines.vllm.worker_side", "pdserve.transfer.staging")
    assert allowed("pdserve.deploy.plan", "pdserve.engines.vllm.command")
