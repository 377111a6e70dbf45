"""A bucket on this machine, for tests of runs that lie in one."""

import os
import uuid

import pytest

from tests.emulator import BUCKET, emulator
from vir_jax.runs.bucket import BucketPath


@pytest.fixture(scope="session")
def server():
    with emulator() as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", running.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # No credentials are looked for on the machine.
        yield running


@pytest.fixture
def bucket(server):
    """The emulator, willing again after the test."""
    yield server
    server.refuse = lambda method, name: False


@pytest.fixture
def folder(bucket):
    """A folder in it that no other test has."""
    return BucketPath(f"gs://{BUCKET}/{os.getpid()}-{uuid.uuid4().hex[:8]}/run")
