"""What a URL may say, and what is shown of it."""

import os
import re
from urllib.parse import parse_qsl, urlsplit

_URL = re.compile(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://", re.IGNORECASE)
_LOCAL = ("file", "local")
# Of Azure's, Amazon's and Google's signed URLs, and what others call theirs.
_SECRET_PARAMETER = re.compile(
    r"sig|signature|(x-amz-|x-goog-)(signature|credential|security-token)|awsaccesskeyid|(access_?|auth_?)?token|"
    r"(api_?|access_?|account_?)?key|password|passwd|pwd|secret|sas",
    re.IGNORECASE,
)
_SECRET_IN_TEXT = re.compile(r"((?:sig|signature|AccountKey|SharedAccessSignature)=)[^&;\s'\"]+", re.IGNORECASE)
# A web server may send us on to a URL that it signs.
_QUERY_IN_TEXT = re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]*", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(AZURE|AWS)_\w*(KEY|SECRET|TOKEN|PASSWORD|CONNECTION_STRING)\w*")


def is_url(place):
    """Whether a place is a URL of another machine, and neither a path nor `file://`."""
    return _URL.match(place) is not None and scheme_of(place) not in _LOCAL


def scheme_of(url):
    """Returns what stands before `://`, in small letters."""
    return url.partition("://")[0].lower()


def normalise_url(url):
    """Returns the URL of a file or folder as fsspec knows it, with its scheme in small letters.

    Raises:
        ValueError: If it holds credentials, or is several URLs, which fsspec joins by `::`.
    """
    if "::" in url:
        raise ValueError(f"{shown(url)}: expected one URL, got several joined by ::")
    refuse_credentials(url)
    scheme = scheme_of(url)
    return scheme + url[len(scheme) :]


def refuse_credentials(url):
    """Raises ValueError if there is a password, token or signature in the URL.

    MLflow records parameters as they are typed, shells keep them in their history, and other users see them in the list
    of processes.
    """
    parts = urlsplit(url)
    # abfss://container@account... names no user.
    with_user = parts.username is not None and scheme_of(url) in ("http", "https")
    signed = any(_SECRET_PARAMETER.fullmatch(name) for name, _ in parse_qsl(parts.query, keep_blank_values=True))
    if with_user or parts.password is not None or signed:
        raise ValueError(
            f"{shown(url)}: expected a URL without a password, token or signature, for MLflow records parameters; give "
            f"it by the environment, for instance in AZURE_STORAGE_SAS_TOKEN, or for http in ~/.netrc"
        )


def shown(url):
    """Returns the URL as messages may show it: without password and query."""
    if "::" in url:
        return "::".join(map(shown, url.split("::")))
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    rest = re.split(r"[?#]", rest)[0] if scheme.lower() in ("http", "https") else rest.partition("?")[0]
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    if ":" in user or scheme.lower() in ("http", "https"):
        authority = host
    return f"{scheme}://{authority}{slash}{path}".removesuffix("/") if path else f"{scheme}://{authority}"


def without_secrets(text):
    """Returns a message of a driver without signatures, and without what Azure's and Amazon's variables hold."""
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.fullmatch(name) and len(value) >= 8:
            # A connection string is rarely repeated whole; its parts are seen to below.
            text = text.replace(value, "***")
            for _, key in re.findall(r"(AccountKey|SharedAccessSignature)=([^;]+)", value):
                text = text.replace(key, "***")
    return _SECRET_IN_TEXT.sub(r"\1***", _QUERY_IN_TEXT.sub(r"\1", text))
