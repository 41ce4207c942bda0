"""Certificates for tests: a CA of our own, a server's and a client's, and those of a stranger."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, as PEM files."""

    cert: Path
    key: Path


@dataclass(frozen=True)
class Authority:
    """A CA; its certificate as a PEM file."""

    ca: Path
    _authority: trustme.CA

    def issue(self, *names: str, not_after: datetime | None = None) -> Issued:
        """A certificate for host names, addresses or e-mail addresses."""
        made = self._authority.issue_cert(*names, not_after=not_after)
        stem = self.ca.with_suffix("") / names[0]
        stem.parent.mkdir(exist_ok=True)
        issued = Issued(Path(f"{stem}.cert.pem"), Path(f"{stem}.key.pem"))
        made.private_key_pem.write_to_path(issued.key)
        issued.cert.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        return issued


def make_authority(folder: Path, name: str = "ca") -> Authority:
    """A new CA, whose files go into `folder`."""
    authority = trustme.CA()
    path = folder / f"{name}.pem"
    authority.cert_pem.write_to_path(path)
    return Authority(path, authority)
