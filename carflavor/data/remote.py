"""Files on other machines, by fsspec: those of Azure by adlfs, of S3 by s3fs, of web servers by aiohttp.

Credentials come from the environment alone, as each driver reads it.
"""

import concurrent.futures
import contextlib
import io
import os
import re
import shutil
import time
from collections import deque
from urllib.parse import unquote, urlsplit

import fsspec
from fsspec.callbacks import Callback

from carflavor.data.failures import UnreachableError, unreachable
from carflavor.data.urls import normalise_url, scheme_of, shown, without_secrets
from carflavor.progress import bytes_bar

_WEB = ("http", "https")
_EXTRAS = {"abfss": "azure", "abfs": "azure", "az": "azure", "s3": "s3", "s3a": "s3"}
# Fetched ahead of the reader: a photo takes tens of milliseconds, nearly all of it waiting.
_REQUESTS = 32
_BYTES_AHEAD = 128_000_000
# Seconds before a file is asked for once more, where the network may be at fault.
_PAUSES = (1, 4)
_FAULTS_OF_THE_FILE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
_TIMEOUT, _TOO_MANY_REQUESTS = 408, 429
_FORBIDDEN = (401, 403)
# For one large file. adlfs would take 128, and its SDK keeps 4 MB of each in memory.
_AZURE_CONNECTIONS = 8
# Who is sent a login or AZURE_STORAGE_SAS_TOKEN: Azure's clouds, its accounts in DNS zones, and OneLake.
_AZURE_HOST = re.compile(
    r"([a-z0-9-]+\.)+(core\.(windows\.net|chinacloudapi\.cn|usgovcloudapi\.net)|storage\.azure\.net|fabric\.microsoft\.com)"
)
_AZURE_SECRETS = ("connection_string", "account_key", "sas_token")


class RemotePlace:
    """A folder or a file at a URL, and what is there when it is first asked; pickles as that.

    Attributes:
        url: The URL.
        place: The same as errors show it.
        name: Last part of its path.
        is_file: Whether it is a file, as whatever a web server has.
        sizes: Dict of relative posix name to bytes, or None where unknown, of all files below a folder.

    Raises:
        ValueError: If the URL holds credentials, lacks a driver, or names no storage account.
        OSError: If nothing is there, or it cannot be reached.
    """

    is_stream = False

    def __init__(self, url):
        self.place = shown(url)
        self.url, scheme = normalise_url(url), scheme_of(url)
        authority, _, path = self.place.partition("://")[2].partition("/")
        path = unquote(path) if scheme in _WEB else path
        self.name = path.rstrip("/").rpartition("/")[2] or authority.partition("@")[0]
        if self.name in (".", ".."):
            raise ValueError(f"{self.place}: expected a URL that ends with a name, got {self.name!r}")
        files, self._path = _open_filesystem(self.url)
        self.is_file, self._size, self.sizes, self._paths = True, None, {}, {}
        # A web server is asked for no more than the file: many refuse or answer wrongly what is asked about it.
        if scheme not in _WEB:
            with _plain_errors(self.place):
                self._look(files)

    def _look(self, files):
        # What the driver remembers may be older than what is there.
        files.invalidate_cache()
        info = files.info(self._path)
        self.is_file, self._size = info["type"] == "file", info["size"]
        if self.is_file:
            return
        found = files.find(self._path, detail=True)
        root = self._path.strip("/")
        for path, info in sorted(found.items()):
            name = path.lstrip("/").removeprefix(root).lstrip("/")
            # A key that ends with a slash stands for an empty folder.
            if name and not path.endswith("/"):
                self.sizes[name], self._paths[name] = info.get("size"), path

    def open(self, name):
        """Returns a seekable binary file that fetches what is read of it; a context manager."""
        # No filesystem is kept: fsspec keeps one for each process, and they do not survive a fork.
        files, _ = _open_filesystem(self.url)
        what = f"{self.place}/{name}"
        return io.BufferedReader(_OpenFile(_ask(what, lambda: files.open(self._paths[name], "rb")), what))

    def read_many(self, names):
        """Yields (name, bytes or OSError) in the order of the names, fetching several at once.

        Raises:
            UnreachableError: If a file cannot be fetched, also when tried again, for a fault that is not its own.
        """
        files, _ = _open_filesystem(self.url)
        # Only what is written for an event loop is known to bear several threads.
        executor = concurrent.futures.ThreadPoolExecutor(_REQUESTS if files.async_impl else 1)
        ahead, num_bytes = deque(), 0
        try:
            for name in names:
                size = self.sizes[name] or 0
                while ahead and (len(ahead) >= 2 * _REQUESTS or num_bytes + size > _BYTES_AHEAD):
                    first, future = ahead.popleft()
                    num_bytes -= self.sizes[first] or 0
                    yield first, future.result()
                ahead.append((name, executor.submit(self._read, files, name)))
                num_bytes += size
            for name, future in ahead:
                yield name, future.result()
        finally:
            executor.shutdown(cancel_futures=True)

    def _read(self, files, name):
        try:
            return _ask(f"{self.place}/{name}", lambda: files.cat_file(self._paths[name]))
        except UnreachableError:
            raise
        except OSError as error:
            return error

    def copy(self, target, names=None):
        """Copies files to this machine, with a progress bar. Each gets its name when it is whole; what is there stays.

        Args:
            target: Path of the file to write, or of a folder where this is one.
            names: Names of the files of a folder to copy; all if None.

        Raises:
            FileNotFoundError: If a file of `names` is not there.
            OSError: If one cannot be fetched, or there is too little space for it.
        """
        files, _ = _open_filesystem(self.url)
        wanted = [file for file in self._choose(target, names) if not file[2].exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        num_bytes = sum(size or 0 for *_, size in wanted)
        if num_bytes > (free := shutil.disk_usage(target.parent).free):
            raise OSError(
                f"{self.place}: expected {num_bytes / 1e9:.1f} GB of space in {target.parent}, got "
                f"{free / 1e9:.1f} GB; TMPDIR names another folder"
            )
        with bytes_bar(f"copy {self.name}", num_bytes or None) as bar:
            for what, path, file, size in wanted:
                _fetch(files, what, path, file, size, bar)
        if not self.is_file:
            target.mkdir(exist_ok=True)

    def _choose(self, target, names):
        """Yields what errors call a file, its path there and here, and its bytes or None where unknown."""
        if self.is_file:
            yield self.place, self._path, target, self._size
            return
        for name in self.sizes if names is None else names:
            if name not in self.sizes:
                raise FileNotFoundError(f"{self.place}/{name} does not exist")
            if ".." in name.split("/"):
                raise OSError(f"{self.place}: expected names below one folder, got {name!r}")
            yield f"{self.place}/{name}", self._paths[name], target / name, self.sizes[name]


def check_url(url):
    """Raises ValueError if a URL is none for `RemotePlace`, as far as can be said of its host without asking it."""
    _open_filesystem(normalise_url(url))


def read_url(url, silent):
    """Returns the bytes of the file at a URL that `check_url` has passed.

    Args:
        url: The URL.
        silent: Set of hosts that did not answer, to which its own is added then. They are asked once: one that is gone
            would hold up all photos of the others.

    Raises:
        OSError: If it cannot be read, also when tried again.
    """
    host = url.split("/")[2]
    try:
        files, path = _open_filesystem(normalise_url(url))
    except ValueError as error:
        raise OSError(str(error)) from None
    with _plain_errors(shown(url)):
        try:
            return _try_again(lambda: files.cat_file(path), () if host in silent else _PAUSES)
        except Exception as error:
            if not _is_of_the_file(error) and _find_status(error) is None:
                silent.add(host)
            raise


class _OpenFile(io.RawIOBase):
    """A driver's file, of which each part is asked for again where the network may be at fault."""

    def __init__(self, file, what):
        self._file, self._what = file, what
        self.seek, self.tell, self.seekable, self.readable = file.seek, file.tell, file.seekable, file.readable

    def readinto(self, buffer):
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self):
        # By itself RawIOBase reads 8 kB at a time.
        return self._read(-1)

    def _read(self, num_bytes):
        position = self._file.tell()

        def read():
            self._file.seek(position)
            return self._file.read(num_bytes)

        return _ask(self._what, read)

    def close(self):
        self._file.close()
        super().close()


def _ask(what, function):
    """Returns what a function of a driver does.

    Raises:
        UnreachableError: If it fails, also when tried again, for a fault that is not the file's.
        OSError: If it fails for one that is.
    """
    try:
        return _try_again(function, _PAUSES)
    except Exception as error:
        # Forbidden in a place that has been listed: a token that has expired, and forbids all that is to come.
        is_forbidden = isinstance(error, PermissionError) or _find_status(error) in _FORBIDDEN
        if _is_of_the_file(error) and not is_forbidden:
            raise _plain(what, error) from None
        raise unreachable(what, _reason(error)) from None


def _try_again(function, pauses):
    for pause in pauses:
        try:
            return function()
        except Exception as error:
            if _is_of_the_file(error):
                raise
        time.sleep(pause)
    return function()


def _is_of_the_file(error):
    """Whether what a driver raised says that a file is missing, forbidden or none; all else may pass."""
    status = _find_status(error)
    if status is None:
        return isinstance(error, _FAULTS_OF_THE_FILE)
    return 400 <= status < 500 and status not in (_TIMEOUT, _TOO_MANY_REQUESTS)


def _find_status(error):
    """Returns the HTTP status in an exception of aiohttp, azure-core, requests or gcsfs, or None."""
    holders = (
        (error, "status"),
        (error, "status_code"),
        (getattr(error, "response", None), "status_code"),
        (error, "code"),
    )
    return next((found for holder in holders if isinstance(found := getattr(*holder, None), int)), None)


def _fetch(files, what, path, target, size, bar):
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    before = bar.n

    def show(total, value, **_):
        if bar.total is None and total:
            bar.total = total
        # Azure's driver reports what its connections have, one after the other: not always more than before.
        bar.update(max(0, before + value - bar.n))

    try:
        with _plain_errors(what):
            files.get_file(path, str(partial), callback=Callback(hooks={"bar": show}))
        fetched = partial.stat().st_size
        if size is not None and fetched != size:
            raise OSError(f"{what}: expected {size} bytes, got {fetched}")
        bar.update(max(0, before + fetched - bar.n))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _open_filesystem(url):
    """Returns fsspec's filesystem, of which each process has one, and the path in it."""
    scheme, place = scheme_of(url), shown(url)
    try:
        options = _azure_options(url) if _EXTRAS.get(scheme) == "azure" else _web_options() if scheme in _WEB else {}
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        remedy = f"pip install 'carflavor[{extra}]'" if extra else without_secrets(str(error))
        raise ValueError(f"{place}: the driver for {scheme}:// is not installed: {remedy}") from None
    except Exception as error:
        # Drivers raise what they like, for instance where a variable is malformed.
        raise ValueError(f"{place}: {_reason(error)}") from None


def _azure_options(url):
    # adlfs reads these itself, but fsspec would go on with an instance from before they were set.
    options = {name: os.environ.get(f"AZURE_STORAGE_{name.upper()}") or None for name in _AZURE_SECRETS}
    options["max_concurrency"] = _AZURE_CONNECTIONS
    authority = urlsplit(url).netloc
    # abfss://container@account.dfs..., abfss://account.dfs.../container, or the container alone, which has no dot.
    host = authority.rpartition("@")[2].lower() if "@" in authority or "." in authority else ""
    account = host.partition(".")[0]
    if connection := options["connection_string"]:
        # adlfs asks the account of the connection string, whatever the URL says.
        in_connection = re.search(r"AccountName=([^;]+)", connection)
        if account and in_connection and in_connection[1] != account:
            raise ValueError(
                f"expected the storage account of AZURE_STORAGE_CONNECTION_STRING, {in_connection[1]}, got {account}"
            )
    elif host and not _AZURE_HOST.fullmatch(host):
        raise ValueError(
            "expected a host of Azure's, such as account.dfs.core.windows.net, for it is sent credentials, "
            f"got {host}; AZURE_STORAGE_CONNECTION_STRING may name another"
        )
    elif host and not host.endswith(".core.windows.net"):
        # adlfs knows the accounts of the public cloud alone.
        options |= {"account_name": account, "account_host": host.replace(".dfs.", ".blob.", 1)}
    elif not host and not os.environ.get("AZURE_STORAGE_ACCOUNT_NAME"):
        raise ValueError(
            "expected a storage account, as in abfss://container@account.dfs.core.windows.net/... or in the variable "
            "AZURE_STORAGE_ACCOUNT_NAME, got none"
        )
    return options


def _web_options():
    # Here, because folders and other stores do without it.
    import aiohttp

    # By itself aiohttp gives up after five minutes, however well a download goes on, and knows no proxy.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}}


@contextlib.contextmanager
def _plain_errors(what):
    """Turns whatever a driver raises into an OSError of one line."""
    try:
        yield
    except Exception as error:
        raise _plain(what, error) from None


def _plain(what, error):
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{what} does not exist")
    return OSError(f"{what}: {_reason(error)}")


def _reason(error):
    # The first line: what follows in Azure's messages is for its support, or signed.
    return without_secrets(str(error).strip().partition("\n")[0]) or type(error).__name__
