"""The HTTPS server under the stand-in for Azure: requests, refusals, routes and its certificate."""

import contextlib
import datetime
import http.server
import ipaddress
import json
import re
import socket
import ssl
import urllib.parse
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PROVIDER = "Microsoft.MachineLearningServices"
LOCATION = "westeurope"
_CODES = {
    400: "BadRequest",
    401: "InvalidAuthenticationToken",
    403: "AuthorizationFailed",
    404: "ResourceNotFound",
    409: "Conflict",
    429: "TooManyRequests",
    500: "InternalServerError",
}


@dataclass
class Record:
    """A request that was made, and how it was answered.

    Attributes:
        method: `GET`, ...
        path: Without the query.
        query: Dictionary of its parameters.
        headers: The message's headers.
        body: What JSON was parsed to, otherwise bytes; None if there was none.
        status: The answer's, or None where the connection was broken instead.
    """

    method: str
    path: str
    query: dict
    headers: object
    body: object
    status: int | None = None


class Refusal(Exception):
    """An answer that is an error, in the form of Azure Resource Manager."""

    def __init__(self, status, message, code=None, details=(), headers=()):
        super().__init__(message)
        self.status, self.headers = status, dict(headers)
        self.body = {"error": {"code": code or _CODES[status], "message": message, "details": list(details)}}


def route(method, template, act):
    """Returns a route: a method, a pattern of whole paths, and the function that answers.

    Args:
        method: `GET`, ...
        template: Path in which `{name}` stands for anything without a slash, and `{rest}` for anything.
        act: Function of the stand-in, a `Record` and what stands in the path for the names; returns status, body and,
            if there are any of its own, headers.
    """
    pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(template)).replace("<rest>[^/]", "<rest>.")
    # Azure's paths are the same in upper and lower case; the names in them are kept as they are.
    return method, re.compile(pattern, re.IGNORECASE), act


class HttpsServer(http.server.ThreadingHTTPServer):
    """A server on a free port of 127.0.0.1.

    Args:
        answer: Function of a `Record` that returns status, body and headers, or None to break the connection.
        certificate: Path to which the certificate is written that clients are to trust.
        key: Path of its key.
    """

    daemon_threads = True

    def __init__(self, answer, certificate, key):
        _write_certificate(certificate, key)
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate, key)

    def finish_request(self, connection, address):
        # In the request's own thread: a client that is slow to shake hands keeps nobody else waiting. One that goes
        # away, or does not trust the certificate, knows of it.
        with contextlib.suppress(OSError), self.context.wrap_socket(connection, server_side=True) as secured:
            super().finish_request(secured, address)


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        """Nothing: requests are recorded."""

    def handle_request(self):
        address = urllib.parse.urlsplit(self.path)
        data = self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = data or None
        if data and "json" in (self.headers["Content-Type"] or ""):
            body = json.loads(data)
        query = dict(urllib.parse.parse_qsl(address.query, keep_blank_values=True))
        answer = self.server.answer(Record(self.command, urllib.parse.unquote(address.path), query, self.headers, body))
        if answer is None:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status, body, headers = answer
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = handle_request


def _write_certificate(certificate, key):
    """Writes a certificate for 127.0.0.1, signed by itself, and its key, both as PEM."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Azure stand-in")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    usage = dict.fromkeys(
        ["content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign"], False
    )
    usage |= {"digital_signature": True, "key_cert_sign": True, "encipher_only": False, "decipher_only": False}
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
        .sign(private, hashes.SHA256())
    )
    certificate.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
