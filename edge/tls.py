"""TLS of the edge: whom it trusts as a cloud, what it shows a cloud, and what it shows its own clients."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final

from isthmus.protocol.errors import CloudUnreachableError, ConfigError

# OpenSSL's verify codes: the certificate holds another host name, or another address.
_OTHER_NAME: Final = (62, 64)
_EXPIRED: Final = 10


def client_context(
    ca: str | Path | None = None, cert: str | Path | None = None, key: str | Path | None = None
) -> ssl.SSLContext:
    """How to talk to clouds. The host name is always checked, TLS is 1.2 or newer.

    `ca`: PEM file with the only certificates to trust (an own CA, or the server's self-signed certificate)
    in place of the system's; `cert`, `key`: PEM files shown to clouds that ask for a client certificate.
    Raises ConfigError `bad_tls` naming the file that is missing or holds something else.
    """
    _check_pair(cert, key, "--tls-client-cert", "--tls-client-key")
    if ca is None:
        context = ssl.create_default_context()
    else:
        _check_readable(ca)
        try:
            context = ssl.create_default_context(cafile=ca)
        except ssl.SSLError as error:
            raise ConfigError(
                f"{ca} holds no certificate: {_reason(error)}", code="bad_tls", hint="it must be a PEM file"
            ) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert is not None and key is not None:
        _load_chain(context, cert, key)
    return context


def check_server_files(cert: str | Path | None, key: str | Path | None) -> None:
    """ConfigError `bad_tls` unless the PEM files can serve TLS, or neither was given."""
    _check_pair(cert, key, "--tls-cert", "--tls-key")
    if cert is not None and key is not None:
        _load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), cert, key)


def _check_pair(cert: str | Path | None, key: str | Path | None, cert_option: str, key_option: str) -> None:
    if (cert is None) != (key is None):
        raise ConfigError(f"{cert_option} and {key_option} go together", code="bad_tls", hint="give both")


def _check_readable(path: str | Path) -> None:
    """The ssl module's own errors don't name the file."""
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", code="bad_tls", hint="check the path and its mode"
        ) from error


def _load_chain(context: ssl.SSLContext, cert: str | Path, key: str | Path) -> None:
    _check_readable(cert)
    _check_readable(key)
    try:
        # An empty pass phrase: else OpenSSL would ask for one on the terminal, where nobody may sit.
        context.load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        raise ConfigError(
            f"{cert} and {key} are no certificate and its key: {_reason(error)}",
            code="bad_tls",
            hint="both must be PEM files that belong together, the key without a pass phrase",
        ) from error


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()


def tls_error(url: str, error: ssl.SSLError) -> CloudUnreachableError:
    """The failed handshake with the cloud at `url` as an error that says what to do."""
    if not isinstance(error, ssl.SSLCertVerificationError):
        return CloudUnreachableError(
            f"TLS with {url} failed: {_reason(error)}",
            code="tls_failed",
            hint="does this port speak TLS, and does the cloud ask for a client certificate "
            "(--tls-client-cert, --tls-client-key)?",
        )
    said = f"the certificate of {url} is not valid: {error.verify_message.rstrip('.')}"
    if error.verify_code in _OTHER_NAME:
        return CloudUnreachableError(
            said, code="tls_name_mismatch", hint="call the cloud by a name that its certificate holds"
        )
    if error.verify_code == _EXPIRED:
        return CloudUnreachableError(said, code="tls_expired", hint="the cloud needs a new certificate")
    return CloudUnreachableError(
        said,
        code="tls_untrusted",
        hint="if the certificate is your own or of your own CA, name its file by --tls-ca",
    )
