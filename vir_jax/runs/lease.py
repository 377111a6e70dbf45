"""A lock in a bucket: an object that its holder writes again and again, for as long as it lives.

No clock is compared with another machine's. Who finds a lock watches it: a holder that lives renews it, so that its
generation changes; one that was killed does not, and after `SECONDS` of watching its lock is taken over. All writes
are on the condition that the object still is what was read, so that of several one wins.
"""

import json
import os
import socket
import threading
import time
import uuid
from types import TracebackType

from absl import logging

from vir_jax.runs.bucket import PATIENCE, BucketError, BucketPath, Version

# A holder that has not renewed its lock for so long has lost it.
SECONDS = 60.0


class LeaseHeldError(RuntimeError):
    """Another run holds the lock; the message says which."""


class Lease:
    """Holds a lock from its `with` statement to the end of the block.

    An outage does not lose the lock: only that another run took it does, which the next renewal finds out.

    Raises:
      LeaseHeldError: another holds it.
      BucketError: the bucket does not answer, or may not be written.
    """

    def __init__(self, path: BucketPath) -> None:
        self._path = path
        self._token = uuid.uuid4().hex
        self._renewals = 0
        self._renewed = 0.0  # By the monotonic clock, when the last renewal that came through began.
        self._generation = b""
        self._lost = False
        self._renewing, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew_until_the_end, name="lease", daemon=True)

    def check(self) -> None:
        """Raise where the lock was lost: the holder must write no more.

        Raises:
          LeaseHeldError: another run took the lock.
        """
        if time.monotonic() - self._renewed > SECONDS * 4 / 5:
            self._renew()
        if self._lost:
            raise LeaseHeldError(f"{self._path} was taken over: it had not been renewed for {SECONDS:.0f} s")

    def __enter__(self) -> "Lease":
        found = self._path.read()
        if found.data is not None:
            found = self._watch(found, _holder(found.data))
        self._renewed = time.monotonic()
        taken = self._path.replace_if(self._content(), found.generation)
        if taken is None:
            raise LeaseHeldError(_holder(self._path.read().data))
        self._generation = taken
        self._thread.start()
        return self

    def _watch(self, found: Version, holder: str) -> Version:
        """Wait until the holder found has ended or must be dead; return what to replace.

        Raises:
          LeaseHeldError: it lives.
        """
        logging.warning(
            "%s is held by %s: watching for %.0f s whether that still runs", self._path, holder, SECONDS
        )
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, SECONDS / 10))
            now = self._path.read()
            if now.data is None:
                return now
            if now.generation != found.generation:
                raise LeaseHeldError(_holder(now.data))
        logging.warning("%s: %s does not run any more; its lock is taken over", self._path, holder)
        return found

    def _renew_until_the_end(self) -> None:
        while not self._lost and not self._ended.wait(SECONDS / 5):
            self._renew()

    def _renew(self) -> None:
        with self._renewing:
            self._renewals += 1
            began = time.monotonic()
            try:
                generation = self._replace(self._content(), patience=SECONDS / 5)
            except BucketError as error:
                logging.warning("the lock was not renewed: %s", error)
                return
            if generation is None:
                self._lost = True
            else:
                self._generation, self._renewed = generation, began

    def _replace(self, data: bytes | None, *, patience: float = PATIENCE) -> bytes | None:
        """Return the new generation, or None where the lock is another's."""
        generation = self._path.replace_if(data, self._generation, patience=patience)
        if generation is None:
            found = self._path.read(patience=patience)
            # A renewal that was given up may have come through after all.
            if _field(found.data, "token") == self._token:
                generation = self._path.replace_if(data, found.generation, patience=patience)
        return generation

    def _content(self) -> bytes:
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        return json.dumps({"holder": holder, "token": self._token, "renewals": self._renewals}).encode()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if not self._lost:
            try:
                self._replace(None)
            except BucketError as failure:
                logging.warning("the lock stays for %.0f s: %s", SECONDS, failure)


def _holder(data: bytes | None) -> str:
    return _field(data, "holder") or "a run that has just begun"


def _field(data: bytes | None, name: str) -> str | None:
    try:
        return str(json.loads(data or b"")[name])
    except (ValueError, KeyError, TypeError):
        return None
