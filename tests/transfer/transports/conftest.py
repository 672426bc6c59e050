"""What the tests here share; a missing library or program skips with its reason."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from net_subject import SECRET

from pdserve.transfer.transports.security import Security


@pytest.fixture
def security():
    return Security(SECRET)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A CA, certificates of two hosts signed by it, and one signed by nobody: name -> (cert, key)."""
    folder = tmp_path_factory.mktemp("tls")
    made = {}
    for name in ("ca", "a", "b", "stranger"):
        cert, key = folder / f"{name}.pem", folder / f"{name}.key"
        argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        argv += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", f"/CN={name}"]
        if name in ("a", "b"):
            argv += ["-CA", str(made["ca"][0]), "-CAkey", str(made["ca"][1])]
        try:
            subprocess.run(argv, check=True, capture_output=True, timeout=60)
        except FileNotFoundError:
            pytest.skip("openssl is not installed")
        made[name] = cert, key
    return {name: (str(cert), str(key)) for name, (cert, key) in made.items()}
