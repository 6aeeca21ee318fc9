"""Opens a folder of shards: a local one, or a mounted or remote one behind a local cache.

The ranks of a node and several runs share the cache. Files are named by their sha256, so two shards
of one name never collide, and changed content is another file. A file appears complete or not at
all. When the cache is full, the least recently used files are removed.
"""

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genrecal_ds.errors import UserError

REMOTE_SCHEMES = ("s3", "gs", "hf", "file")  # what a recipe may allow; never a shell, never http
BLOCK_BYTES = 2**22
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
# An allow-list of one (a local path): PIPE:, " pipe:", s3://, hf:// ... all look like this.
_URL_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):")


class StoreError(Exception):
    """A file that cannot be fetched whole; the message is one line."""


@dataclass(frozen=True)
class ShardStore:
    """A folder of shards, by location; small and picklable.

    location: a local path, or `scheme://...` with a scheme of `allowed`. cache: a local folder,
    needed for a remote location. max_cache_bytes bounds the shards in it.
    """

    location: str
    allowed: tuple[str, ...] = ()
    cache: Path | None = None
    max_cache_bytes: int = 2**40

    def __post_init__(self) -> None:
        if self.scheme is None:
            return
        if self.scheme not in self.allowed or self.scheme not in REMOTE_SCHEMES:
            raise UserError(
                f"{self.location!r}: shards live in a local folder only; name a plain path, or "
                f"allow its scheme in data.remote ({', '.join(REMOTE_SCHEMES)})"
            )
        if self.cache is None:
            raise UserError(f"{self.location}: a remote folder needs data.cache; name a local one")

    @property
    def scheme(self) -> str | None:
        """None for a local path. Raises UserError for anything that only looks like one."""
        if "\0" in self.location or "::" in self.location:
            raise UserError(f"{self.location!r}: shards live in a local folder only")
        match = _URL_SCHEME.match(self.location)
        return match[1] if match else None

    @property
    def directory(self) -> Path:
        """The folder of manifest and index: the folder itself, or its part of the cache."""
        if self.scheme is None:
            return Path(self.location).absolute()
        assert self.cache is not None
        name = hashlib.sha256(self.location.encode()).hexdigest()[:16]
        return self.cache.absolute() / f"remote-{name}"

    def fetch_small(self, name: str) -> None:
        """Bring a remote folder's current manifest, index or table into `directory`.

        Raises StoreError. Nothing to do for a local folder.
        """
        if self.scheme is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with _locked(self.directory / ".lock"):
            os.close(self._copy(name, self.directory / name, None))

    def sizes(self) -> dict[str, int] | None:
        """Bytes of every tar of a remote folder, by one listing; None for a local folder."""
        if self.scheme is None:
            return None
        try:
            entries = self._filesystem().ls(self._remote(""), detail=True)
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.location}: {type(error).__name__}: {error}"[:300]) from error
        return {
            str(entry["name"]).rsplit("/", 1)[-1]: int(entry["size"] or 0)
            for entry in entries
            if str(entry["name"]).endswith(".tar")
        }

    def open(self, name: str, sha256: str) -> int:
        """A descriptor of a shard, from the folder or the cache. Raises OSError or StoreError."""
        if self.cache is None:
            return os.open(self.directory / name, _READ)
        target = self.cache / f"{sha256}.tar"
        try:
            return _open_used(target)
        except FileNotFoundError:
            self.cache.mkdir(parents=True, exist_ok=True)
        with _locked(self.cache / f".lock-{sha256[:2]}"):
            try:
                return _open_used(target)  # another rank was faster
            except FileNotFoundError:
                descriptor = self._copy(name, target, sha256)
        self._make_room(target)
        return descriptor

    def _copy(self, name: str, target: Path, sha256: str | None) -> int:
        """Copy, verify, rename; a wrong or cut copy never gets the name. Returns a descriptor.

        The copy is opened before the rename: after it another process may already remove the file.
        """
        temporary = target.with_name(f".{target.name}.tmp")
        digest = hashlib.sha256()
        try:
            with self._source(name) as source, temporary.open("wb") as file:
                while block := source.read(BLOCK_BYTES):
                    digest.update(block)
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            if sha256 is not None and digest.hexdigest() != sha256:
                raise StoreError(f"{self.location}/{name}: sha256 is not the manifest's {sha256}")
            descriptor = os.open(temporary, _READ)
            os.replace(temporary, target)
            return descriptor
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{self.location}/{name}: {type(error).__name__}: {error}"[:300]
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _source(self, name: str) -> Any:
        if self.scheme is None:
            path = self.directory / name
            return os.fdopen(os.open(path, _READ), "rb")
        return self._filesystem().open(self._remote(name), "rb")

    def _filesystem(self) -> Any:
        """Chosen by scheme alone: fsspec's own URL parsing would follow chained URLs."""
        import fsspec

        try:
            return fsspec.filesystem(self.scheme)
        except ImportError as error:
            raise UserError(f"{self.location}: {error}; pip install genrecal_ds[cloud]") from None

    def _remote(self, name: str) -> str:
        base = self.location.split("://", 1)[1].rstrip("/")
        return f"{base}/{name}" if name else base

    def _make_room(self, keep: Path) -> None:
        assert self.cache is not None
        files = []
        for path in self.cache.glob("*.tar"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another process made room as well
            files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_cache_bytes:
                return
            if path != keep:
                # readers that have it open keep their descriptor; the space follows when they end
                path.unlink(missing_ok=True)
                total -= size


def _open_used(path: Path) -> int:
    """Open a cached shard and mark it as just used."""
    descriptor = os.open(path, _READ)
    os.utime(descriptor)
    return descriptor


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process of the node in at a time; the lock ends with its process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
