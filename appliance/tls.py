"""Certificates to a TLS context, and what is wrong with them in words: whose certificate or which file, and what to do.

TLS 1.2 is the least, and the server's name is always checked: there is no setting that would leave it out.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from appliance.errors import CertificateError

EVERYBODY = 0o007

NOT_YET_VALID, EXPIRED = 9, 10
WRONG_NAMES = (62, 64)
UNKNOWN_SIGNERS = (2, 18, 19, 20, 21)
"""OpenSSL's X509_V_ERR_…: `verify_code` of a certificate that was not accepted."""

OURS_REFUSED = {
    "CERTIFICATE_REQUIRED": ("the broker wants a certificate of ours", "set certificate_file and key_file"),
    "HANDSHAKE_FAILURE": ("the broker refuses the handshake", "does it want certificate_file and key_file?"),
    "CERTIFICATE_EXPIRED": ("the broker says that our certificate has expired", "renew certificate_file"),
    "CERTIFICATE_REVOKED": ("the broker says that our certificate is revoked", "have a new one made"),
    "UNKNOWN_CA": (
        "the broker does not know who signed our certificate",
        "have it signed by the authority that the broker trusts",
    ),
    "BAD_CERTIFICATE": (
        "the broker refuses our certificate",
        "see certificate_file: its dates, its signer and what it is for; the broker's log says more",
    ),
    "WRONG_VERSION_NUMBER": ("the broker speaks no TLS on this port", "set the port of its TLS listener"),
}
"""Parts of OpenSSL's reasons, by what a broker answers to our certificate. TLS 1.3 does so after the handshake."""


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files: whom we trust, and, where the broker wants to know who we are, our certificate and its key."""

    ca: Path
    certificate: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """A client's context, from the files as they are now: a renewed certificate needs no restart.

        Raises CertificateError naming the file: missing, unreadable, open to everybody, encrypted, no PEM, or a key of
        another certificate.
        """
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        made.sslsocket_class = _Socket
        _check_readable("ca_file", self.ca)
        try:
            made.load_verify_locations(self.ca)
        except ssl.SSLError as error:
            raise CertificateError(f"ca_file {self.ca} holds no certificate", "write it as PEM") from error
        if self.certificate is not None and self.key is not None:
            _check_readable("certificate_file", self.certificate)
            _check_readable("key_file", self.key)
            _check_private(self.key)
            _load_own(made, self.certificate, self.key)
        return made


class _Socket(ssl.SSLSocket):
    """paho 2.2 forgets the socket of a handshake that failed, and leaves it open."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


def explained(error: ssl.SSLError | ConnectionResetError, host: str) -> CertificateError:
    """Why the handshake with the broker `host` failed, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _unverified(error, host)
    if isinstance(error, ConnectionResetError | ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return CertificateError("the broker ends the TLS handshake", "is this the port of its TLS listener?")
    return _alerted(str(error)) or CertificateError(f"TLS failed: {error.reason or error}", "see the broker's log")


def refused(text: str, connection: object) -> CertificateError | None:
    """Why the broker ended a link that it had not accepted yet, from what was logged of it; None on a plain link.

    Where a write failed, what the broker said before it hung up can still be read.
    """
    if not isinstance(connection, ssl.SSLSocket):
        return None
    unknown = CertificateError("the broker ends the TLS link", "does it accept our certificate? Its log says more")
    return _alerted(text) or _alerted(_last_words(connection)) or unknown


def _alerted(text: str) -> CertificateError | None:
    for part, (what, remedy) in OURS_REFUSED.items():
        if part in text:
            return CertificateError(what, remedy)
    return None


def _last_words(connection: ssl.SSLSocket) -> str:
    try:
        connection.recv(1)
    except OSError as error:
        return str(error)
    return ""


def _unverified(error: ssl.SSLCertVerificationError, host: str) -> CertificateError:
    now = datetime.now().astimezone().isoformat(" ", "minutes")
    if error.verify_code == NOT_YET_VALID:
        what = f"by this machine's clock ({now}) the broker's certificate is not valid yet"
        return CertificateError(what, "set the clock: has it lost its time, or no time server?")
    if error.verify_code == EXPIRED:
        what = f"by this machine's clock ({now}) the broker's certificate has expired"
        return CertificateError(what, "renew it at the broker, or set the clock if that is wrong")
    if error.verify_code in WRONG_NAMES:
        what = f"the broker's certificate is not for {host}"
        return CertificateError(what, "use the host name that it bears, or have one made for this name")
    if error.verify_code in UNKNOWN_SIGNERS:
        what = "the broker's certificate is signed by nobody in ca_file"
        return CertificateError(what, "put the certificate of the authority that signed it there")
    return CertificateError(f"the broker's certificate is not accepted: {error.verify_message}", "have it made anew")


def _check_readable(key: str, path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        what = f"{key} {path} cannot be read: {error.strerror}"
        raise CertificateError(what, "correct its path, owner and rights, or name it with LoadCredential=") from error


def _check_private(key: Path) -> None:
    """Group is allowed: systemd shows the access that it gives to a credential as the group's."""
    if key.stat().st_mode & EVERYBODY:
        raise CertificateError(f"key_file {key} is open to everybody", "chmod o-rwx, and give it to who needs it")


def _load_own(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    try:
        context.load_cert_chain(certificate, key, password="")  # without one OpenSSL would ask on the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CertificateError(f"key_file {key} is not the key of {certificate}", "name the pair") from error
        what = f"certificate_file {certificate} and key_file {key} cannot be used: {error.reason or error}"
        raise CertificateError(what, "write both as PEM, the key without a passphrase") from error
