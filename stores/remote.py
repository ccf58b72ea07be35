"""Stores on object storage (`s3://`, `gs://`, `az://`), for reading.

`RemotePath` answers what reading asks of `pathlib.Path`, and opens Zarr arrays; who writes asks
for `local_folder` and is refused. obstore does the talking. It is imported when a URL is opened: a
store on local disk does without.

An object is replaced whole, so one request never sees two versions of it; a shard takes several,
its index first. Each is bound to the version (ETag) that the index had: two versions may differ in
where a row lies, and then every checksum would match.
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
# What waits for a server a thousand kilometres away; each takes a thread and little else.
REQUESTS = 32
# `Path("s3://bucket")` has one slash left.
_URL = re.compile(r"(\w+):/{1,2}([^/].*)")
# A dead endpoint is told of in 10 s; a large object may take its time as long as bytes arrive.
_PATIENCE = {"connect_timeout": "3s", "read_timeout": "10s", "timeout": "10min"}
_RETRIES = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
# The version of each object that the current read began with.
_VERSIONS: ContextVar[Mapping[str, str]] = ContextVar("_VERSIONS", default=MappingProxyType({}))
_threads_of: int | None = None


class Unreachable(ConnectionError):
    """Object storage gave no answer, or refused; the message says what to check."""


class Replaced(ValueError):
    """An object was replaced while a shard was being read."""


@dataclass(frozen=True, order=True)
class RemotePath:
    """A key of a bucket, by the names of `pathlib.Path`. Listing shows folders, as a disk does."""

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
        """Raises: FileNotFoundError, Unreachable."""
        return self.bucket.read(self.key)

    def exists(self) -> bool:
        """Whether there is such a folder."""
        return any(self.bucket.names(self.key))

    def glob(self, pattern: str) -> list["RemotePath"]:
        """For patterns such as "*/*/zarr.json": folders of any name, then a file of that one."""
        *folders, file = pattern.split("/")
        found = [self]
        with ThreadPoolExecutor(REQUESTS) as pool:
            for _ in folders:
                inner = pool.map(lambda folder: self.bucket.names(folder.key)[0], found)
                found = [f / name for f, names in zip(found, inner, strict=True) for name in names]
            held = list(pool.map(lambda folder: self.bucket.names(folder.key)[1], found))
        return [f / file for f, names in zip(found, held, strict=True) if file in names]

    def open_array(self) -> "zarr.Array[Any]":
        return zarr.open_array(Objects(self.bucket), path=self.key, mode="r", zarr_format=3)


Place = Path | RemotePath


def place_of(path: "str | Path | RemotePath", options: Mapping[str, Any] | None = None) -> Place:
    """Where a store lies.

    Args:
        path: A folder, or a URL.
        options: For a URL: what `obstore.store.from_url` takes, such as `endpoint`.

    Raises:
        ValueError: A URL that cannot be read, or options that do not belong to it.
        ModuleNotFoundError: obstore is not installed.
    """
    if isinstance(path, RemotePath):
        return path
    match = _URL.fullmatch(str(path))
    scheme = match[1] if match else ""
    if scheme in ("http", "https"):
        raise ValueError(
            f"{path}: a store's columns are found by listing, and a web server lists nothing. Give "
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
    """A store's folder, for who writes.

    Raises:
        io.UnsupportedOperation: It lies on object storage.
    """
    match = _URL.fullmatch(str(path))
    if isinstance(path, RemotePath) or (match and match[1] in (*SCHEMES, "http", "https")):
        raise io.UnsupportedOperation(
            f"{path} is on object storage, where a store is read only. Build on a local disk and "
            "copy the store there (`aws s3 sync STORE s3://...`, or `rclone sync`)"
        )
    # Whole: the same file by two names would be two files to who compares names.
    return Path(path).absolute()


def open_array(place: Place) -> "zarr.Array[Any]":
    """A Zarr array, to read."""
    if isinstance(place, RemotePath):
        return place.open_array()
    return zarr.open_array(LocalStore(place, read_only=True), mode="r", zarr_format=3)


def mending(place: Place, locally: str) -> str:
    """The next move where a file is damaged."""
    return locally if isinstance(place, Path) else "Copy the store there again"


class _Bucket:
    """A bucket, or what lies below a prefix of it. Pickles with the options it was opened with."""

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
        given: dict[str, Any] = {"retry_config": _RETRIES, **options}
        given["client_options"] = _PATIENCE | plain | dict(options.get("client_options", {}))
        try:
            self.client: Client = from_url(url, **given)
        except (BaseError, TypeError) as error:
            raise ValueError(f"{url} cannot be opened: {_first(error)}") from error

    def read(self, key: str) -> bytes:
        import obstore

        with self.asking(key):
            return bytes(obstore.get(self.client, key).bytes())

    def names(self, key: str) -> tuple[list[str], list[str]]:
        """Names of the folders, and of the files, in a folder; both empty where there is none."""
        import obstore

        with self.asking(f"{key}/"):
            found = obstore.list_with_delimiter(self.client, key or None)
        folders = [folder.rpartition("/")[2] for folder in found["common_prefixes"]]
        return sorted(folders), sorted(o["path"].rpartition("/")[2] for o in found["objects"])

    @contextmanager
    def asking(self, key: str) -> Iterator[None]:
        """Tell what obstore raises in words of ours.

        Raises:
            FileNotFoundError: There is no such object, or no such bucket.
            Unreachable: No answer, or a refusal.
        """
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        global _threads_of
        _threads_of = _threads_of or os.getpid()
        if _threads_of != os.getpid():
            raise Unreachable(
                f"{self.url} was read before this process was forked, and obstore's threads stayed "
                'behind. Start workers afresh: DataLoader(..., multiprocessing_context="spawn")'
            )
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.url}/{key}: {_first(error)}") from error
        except BaseError as error:
            said = _first(error)
            move = "Check the network, the endpoint and the region"
            if isinstance(error, PermissionDeniedError | UnauthenticatedError):
                move = "Check the keys, and that they may read and list the bucket"
            if "169.254.169.254" in said:
                move = "No keys were found: set them, or `skip_signature` for a public bucket"
            where = "the provider's environment variables"
            if self.url.startswith("s3"):
                where = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL"
            raise Unreachable(
                f"{self.url}/{key} cannot be read: {said}. {move} ({where}, or storage_options)"
            ) from error


class Objects(ObjectStore["Client"]):
    """The bucket as zarr sees it: an index is fetched once, chunks are of the index's version.

    Attributes:
        replaced: How often an object was found to be of another version than its index.
    """

    def __init__(self, bucket: _Bucket, *, read_only: bool = True) -> None:
        super().__init__(bucket.client, read_only=True)
        self._bucket, self.replaced = bucket, 0
        # Touched in zarr's own thread alone.
        self._indices: dict[str, asyncio.Task[tuple[str | None, Any]]] = {}

    def __reduce__(self) -> "tuple[type[Objects], tuple[_Bucket]]":
        return Objects, (self._bucket,)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        try:
            with self._bucket.asking(key):
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
            asked = (byte_range.start, byte_range.end)
            version, data = await self._fetch(key, {"range": asked}, _VERSIONS.get().get(key))
        else:  # a whole object
            return (await self._fetch(key, {}))[1]
        if version is not None:
            _VERSIONS.set({**_VERSIONS.get(), key: version})
        return data

    async def _index(self, key: str, size: int) -> tuple[str | None, Any]:
        """The end of an object. Who asks while it is on its way waits for the same answer."""
        task = self._indices.get(key)
        if task is None:
            self._indices[key] = task = asyncio.create_task(self._end(key, size))
        try:
            return await asyncio.shield(task)
        except Exception:  # whichever it is, the next to ask tries again
            self._indices.pop(key, None)
            raise

    async def _end(self, key: str, size: int) -> tuple[str | None, Any]:
        import obstore
        from obstore.exceptions import NotSupportedError

        try:
            return await self._fetch(key, {"range": {"suffix": size}})
        except NotSupportedError:  # Azure counts from the beginning only
            head = await obstore.head_async(self.store, key)
            asked = (head["size"] - size, head["size"])
            return await self._fetch(key, {"range": asked}, head["e_tag"])

    async def _fetch(
        self, key: str, options: dict[str, Any], version: str | None = None
    ) -> tuple[str | None, Any]:
        """Some bytes and the version they are of.

        Raises:
            Replaced: Another than `version`.
        """
        import obstore
        from obstore.exceptions import PreconditionError

        options |= {"if_match": version} if version else {}
        try:
            result = await obstore.get_async(self.store, key, options=options)  # type: ignore[arg-type]
            found = result.meta["e_tag"]
            if version and found != version:  # the server knows no conditions
                raise PreconditionError(found)
        except PreconditionError:
            self.replaced += 1
            self._indices.pop(key, None)
            raise Replaced(f"{self._bucket.url}/{key} was replaced; read it again") from None
        return found, await result.bytes_async()


def _first(error: Exception) -> str:
    """What happened, of the pages that obstore tells: its first line, and the server's code."""
    text = str(error).partition("\n\nDebug source")[0]
    said = [m[1] for m in re.finditer(r"<(?:Code|Message)>(.*?)</", text)]
    line = text.partition("<?xml")[0].partition("\n")[0].strip().rstrip(":-. ")
    return " ".join([line, f"({': '.join(said)})" if said else ""]).strip()
