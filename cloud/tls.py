"""The cloud's TLS context from files, with typed errors that name the file."""

from __future__ import annotations

import ssl
from pathlib import Path

from isthmus.protocol.errors import ConfigError


def server_context(cert: Path, key: Path, client_ca: Path | None = None) -> ssl.SSLContext:
    """TLS 1.2 or newer with the certificate chain `cert` and its `key`, both PEM and the key not encrypted.
    With `client_ca`, only clients with a certificate signed by it get through the handshake.

    Raises ConfigError `bad_tls` naming the file that is missing, unreadable or of the wrong kind.
    """
    for path in (cert, key, client_ca):
        if path is not None:
            _check_readable(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without a password function OpenSSL would ask on the terminal and the server would hang there.
        context.load_cert_chain(cert, key, password=lambda: _refuse_password(key))
    except ssl.SSLError as error:
        raise ConfigError(
            f"{cert} and {key} are not a certificate and its key: {error.reason or error}",
            code="bad_tls",
            hint="both as PEM; the certificate first, then those of the authorities between it and the root",
        ) from error
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except ssl.SSLError as error:
            raise ConfigError(
                f"{client_ca} holds no certificate: {error.reason or error}", code="bad_tls", hint="PEM"
            ) from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}", code="bad_tls") from error


def _refuse_password(key: Path) -> str:
    raise ConfigError(
        f"the key {key} is encrypted", code="bad_tls", hint="give a key without a passphrase, mode 0600"
    )
