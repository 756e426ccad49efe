"""One double of AWS with our stack in it, and the cluster files filled with its ids."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.clusters.aws_double import CLUSTERS, ROOT, STACK, Account, environment, moto_server


@pytest.fixture(scope="session")
def aws(tmp_path_factory):
    """``account``, ``stack`` (its outputs), ``folder`` (home and log of the stand-ins), ``environment``, ``files``."""
    folder = tmp_path_factory.mktemp("aws")
    with moto_server(folder) as url:
        account = Account(url)
        stack = account.create_stack()
        files = folder / "clusters"
        files.mkdir()
        for name in ("aws.yaml", "aws-spot.yaml"):
            shutil.copy(CLUSTERS / name, files)
        env = environment(folder, url)
        fill = [sys.executable, str(CLUSTERS / "fill.py"), STACK, "--folder", str(files)]
        subprocess.run(fill, env=env, check=True, cwd=ROOT, capture_output=True, text=True)
        yield SimpleNamespace(account=account, stack=stack, folder=folder, environment=env, files=files)
