"""Locations of stores: local folders, and object storage (`s3://`, `gs://`, `az://`) for reading.

`RemotePath` has the methods of `pathlib.Path` that reading needs, and opens Zarr arrays. Code that
writes calls `local_folder`, which raises for object storage. Requests are made with obstore, which
is imported when a URL is opened and not needed for a local store.

An object is replaced as a whole, so one request never sees two versions. A shard takes several
requests, the first for its index. The others are conditional on the version (ETag) of the index:
a row may have another offset in another version, and every checksum would still match.
"""

import asyncio
import io
import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import zarr
from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, ObjectStore

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Client

SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
# Number of parallel requests. This many hide the latency of a distant server.
REQUESTS = 32
# `Path("s3://bucket")` keeps only one slash.
_URL = re.compile(r"(\w+):/{1,2}([^/].*)")
# A dead endpoint fails after 10 s; a large object may take longer as long as bytes arrive.
_PATIENCE = {"connect_timeout": "3s", "read_timeout": "10s", "timeout": "10min"}
_RETRIES = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
# Version of each object at the start of the current read.
_VERSIONS: ContextVar[Mapping[str, str]] = ContextVar("_VERSIONS", default=MappingProxyType({}))
_threads_of: int | None = None


class Unreachable(ConnectionError):
    """Object storage did not respond, or refused; the message names what to check."""


class Replaced(ValueError):
    """An object was replaced while a shard was being read."""


@dataclass(frozen=True, order=True)
class RemotePath:
    """A key of a bucket, with methods of `pathlib.Path`. Common prefixes are folders."""

    key: str
    bucket: "_Bucket" = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.bucket.url}/{self.key}" if self.key else self.bucket.url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.key}/{name}" if self.key else name, self.bucket)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.key.split("/"))

    @property
    def name(self) -> str:
        return self.parts[-1]

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.key.rpartition("/")[0], self.bucket)

    def with_name(self, name: str) -> "RemotePath":
        return self.parent / name

    def read_bytes(self) -> bytes:
        """Return the object's bytes.

        Raises:
            FileNotFoundError: There is no such object.
            Unreachable: The server does not respond, or refuses.
        """
        return self.bucket.read(self.key)

    def exists(self) -> bool:
        """Return whether there is such a folder."""
        return any(self.bucket.names(self.key))

    def glob(self, pattern: str) -> list["RemotePath"]:
        """Return the files that match a pattern such as "*/*/zarr.json": any folders, one name."""
        *levels, file = pattern.split("/")
        folders = [self]
        with ThreadPoolExecutor(REQUESTS) as pool:
            for _ in levels:
                inner = pool.map(lambda folder: self.bucket.names(folder.key)[0], folders)
                folders = [f / n for f, names in zip(folders, inner, strict=True) for n in names]
            files = list(pool.map(lambda folder: self.bucket.names(folder.key)[1], folders))
        return [f / file for f, names in zip(folders, files, strict=True) if file in names]

    def open_array(self) -> "zarr.Array[Any]":
        """Open the Zarr array at this key for reading."""
        return zarr.open_array(Objects(self.bucket), path=self.key, mode="r", zarr_format=3)


Location = Path | RemotePath


def location_of(
    path: "str | Path | RemotePath", options: Mapping[str, Any] | None = None
) -> Location:
    """Return the location of a store.

    Args:
        path: A folder, or a URL.
        options: For a URL: arguments of `obstore.store.from_url`, such as `endpoint`.

    Raises:
        ValueError: The URL or its options are not valid.
        ModuleNotFoundError: obstore is not installed.
    """
    if isinstance(path, RemotePath):
        return path
    match = _URL.fullmatch(str(path))
    scheme = match[1] if match else ""
    if scheme in ("http", "https"):
        raise ValueError(
            f"{path}: a store's columns are listed, and a web server has no listing. Give "
            "the bucket (s3://BUCKET/PREFIX, storage_options={'endpoint': 'https://...'}), or copy "
            "the store to a local disk (`rclone copy`)"
        )
    if match and scheme in SCHEMES:
        return RemotePath("", _Bucket(f"{scheme}://{match[2].rstrip('/')}", options or {}))
    if "://" in str(path):
        raise ValueError(f"{path}: a store is a folder, or a URL of {', '.join(SCHEMES)}")
    if options:
        raise ValueError(f"storage_options are for object storage; {path} is a local folder")
    return Path(path).absolute()


def local_folder(path: "str | Path | RemotePath") -> Path:
    """Return the absolute path of a local store.

    Raises:
        io.UnsupportedOperation: The store is on object storage.
    """
    match = _URL.fullmatch(str(path))
    if isinstance(path, RemotePath) or (match and match[1] in (*SCHEMES, "http", "https")):
        raise io.UnsupportedOperation(
            f"{path} is on object storage, where a store is read only. Build on a local disk and "
            "copy the store there (`aws s3 sync STORE s3://...`, or `rclone sync`)"
        )
    # Absolute, because paths are compared: one file must have one name.
    return Path(path).absolute()


def open_array(location: Location) -> "zarr.Array[Any]":
    """Open a Zarr array for reading."""
    if isinstance(location, RemotePath):
        return location.open_array()
    return zarr.open_array(LocalStore(location, read_only=True), mode="r", zarr_format=3)


def repair_hint(location: Location, locally: str) -> str:
    """Return how to repair a damaged file: `locally` on a local disk."""
    return locally if isinstance(location, Path) else "Copy the store there again"


class _Bucket:
    """A bucket, or a prefix of one. It is pickled with its URL and options."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        try:
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{url} is read with obstore, which is not installed: pip install 'obstore>=0.12'"
            ) from error
        self.url = url
        endpoints = [options.get("endpoint"), *map(os.environ.get, _ENDPOINTS)]
        endpoint = str(next(filter(None, endpoints), ""))
        plain = {"allow_http": True} if endpoint.startswith("http://") else {}
        arguments: dict[str, Any] = {"retry_config": _RETRIES, **options}
        arguments["client_options"] = _PATIENCE | plain | dict(options.get("client_options", {}))
        try:
            self.client: Client = from_url(url, **arguments)
        except (BaseError, TypeError) as error:
            raise ValueError(f"{url} cannot be opened: {_first(error)}") from error

    def read(self, key: str) -> bytes:
        """Return the bytes of an object."""
        import obstore

        with self.errors_explained(key):
            return bytes(obstore.get(self.client, key).bytes())

    def names(self, key: str) -> tuple[list[str], list[str]]:
        """Return the names of the folders and of the files in a folder; both empty without one."""
        import obstore

        with self.errors_explained(f"{key}/"):
            listing = obstore.list_with_delimiter(self.client, key or None)
        folders = [folder.rpartition("/")[2] for folder in listing["common_prefixes"]]
        return sorted(folders), sorted(o["path"].rpartition("/")[2] for o in listing["objects"])

    @contextmanager
    def errors_explained(self, key: str) -> Iterator[None]:
        """Replace obstore's errors by errors that name the cause and what to check.

        Raises:
            FileNotFoundError: There is no such object, or no such bucket.
            Unreachable: The server does not respond, or refuses.
        """
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        global _threads_of
        _threads_of = _threads_of or os.getpid()
        if _threads_of != os.getpid():
            raise Unreachable(
                f"{self.url} was read before this process was forked, and a fork does not copy "
                "obstore's threads. "
                'Start workers afresh: DataLoader(..., multiprocessing_context="spawn")'
            )
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.url}/{key}: {_first(error)}") from error
        except BaseError as error:
            cause = _first(error)
            move = "Check the network, the endpoint and the region"
            if isinstance(error, PermissionDeniedError | UnauthenticatedError):
                move = "Check the keys, and that they may read and list the bucket"
            if "169.254.169.254" in cause:
                move = "No keys were found: set them, or `skip_signature` for a public bucket"
            where = "the provider's environment variables"
            if self.url.startswith("s3"):
                where = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL"
            raise Unreachable(
                f"{self.url}/{key} cannot be read: {cause}. {move} ({where}, or storage_options)"
            ) from error


class Objects(ObjectStore["Client"]):
    """Zarr store of a bucket. An index is fetched once; chunks are of the version of their index.

    Attributes:
        replaced: Number of requests that met another version than that of the index.
    """

    def __init__(self, bucket: _Bucket, *, read_only: bool = True) -> None:
        super().__init__(bucket.client, read_only=True)
        self._bucket, self.replaced = bucket, 0
        # Used in zarr's own thread only.
        self._indices: dict[str, asyncio.Task[tuple[str | None, Any]]] = {}

    def __reduce__(self) -> "tuple[type[Objects], tuple[_Bucket]]":
        return Objects, (self._bucket,)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        try:
            with self._bucket.errors_explained(key):
                data = await self._bytes(key, byte_range)
        except FileNotFoundError:
            self._indices.pop(key, None)
            return None
        return prototype.buffer.from_bytes(data)

    async def get_ranges(
        self, key: str, byte_ranges: Sequence[ByteRequest | None], **options: Any
    ) -> AsyncIterator[Sequence[tuple[int, Buffer | None]]]:
        try:
            async for group in super().get_ranges(key, byte_ranges, **options):
                yield group
        except BaseExceptionGroup as group:
            ours, _ = group.split((Unreachable, Replaced))
            if ours is None:
                raise
            raise ours.exceptions[0] from None

    async def _bytes(self, key: str, byte_range: ByteRequest | None) -> Any:
        if isinstance(byte_range, SuffixByteRequest):
            version, data = await self._index(key, byte_range.suffix)
        elif isinstance(byte_range, RangeByteRequest):
            interval = (byte_range.start, byte_range.end)
            version, data = await self._fetch(key, {"range": interval}, _VERSIONS.get().get(key))
        else:  # a whole object
            return (await self._fetch(key, {}))[1]
        if version is not None:
            _VERSIONS.set({**_VERSIONS.get(), key: version})
        return data

    async def _index(self, key: str, size: int) -> tuple[str | None, Any]:
        """Return the end of an object. Concurrent calls share one request."""
        task = self._indices.get(key)
        if task is None:
            self._indices[key] = task = asyncio.create_task(self._end(key, size))
        try:
            return await asyncio.shield(task)
        except Exception:  # the next call tries again
            self._indices.pop(key, None)
            raise

    async def _end(self, key: str, size: int) -> tuple[str | None, Any]:
        import obstore
        from obstore.exceptions import NotSupportedError

        try:
            return await self._fetch(key, {"range": {"suffix": size}})
        except NotSupportedError:  # Azure accepts no suffix ranges
            head = await obstore.head_async(self.store, key)
            interval = (head["size"] - size, head["size"])
            return await self._fetch(key, {"range": interval}, head["e_tag"])

    async def _fetch(
        self, key: str, options: dict[str, Any], version: str | None = None
    ) -> tuple[str | None, Any]:
        """Return the version of an object and some of its bytes.

        Raises:
            Replaced: The object's version is not `version`.
        """
        import obstore
        from obstore.exceptions import PreconditionError

        options |= {"if_match": version} if version else {}
        try:
            result = await obstore.get_async(self.store, key, options=options)  # type: ignore[arg-type]
            current = result.meta["e_tag"]
            if version and current != version:  # the server ignores conditions
                raise PreconditionError(current)
        except PreconditionError:
            self.replaced += 1
            self._indices.pop(key, None)
            raise Replaced(f"{self._bucket.url}/{key} was replaced; read it again") from None
        return current, await result.bytes_async()


def _first(error: Exception) -> str:
    """Return the first line of obstore's long message, and the server's error code."""
    text = str(error).partition("\n\nDebug source")[0]
    codes = [m[1] for m in re.finditer(r"<(?:Code|Message)>(.*?)</", text)]
    line = text.partition("<?xml")[0].partition("\n")[0].strip().rstrip(":-. ")
    return " ".join([line, f"({': '.join(codes)})" if codes else ""]).strip()
