"""A certificate authority of a test's own, made with the openssl command, and what it signs."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

from appliance.tls import Certificates

SETTINGS = """\
[ca]
default_ca = here
[here]
database = {folder}/index
new_certs_dir = {folder}
certificate = {folder}/ca.crt
private_key = {folder}/ca.key
rand_serial = yes
default_md = sha256
default_crl_days = 30
unique_subject = no
copy_extensions = copy
policy = any
[any]
commonName = supplied
"""
NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc")


class Authority:
    """Signs for a few years unless told otherwise; its own certificate is `ca`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder, self.ca, self.revoked = folder, folder / "ca.crt", folder / "revoked.crl"
        (folder / "index").touch()
        (folder / "settings").write_text(SETTINGS.format(folder=folder))
        _openssl("req", "-x509", *NEW_KEY, "-subj", f"/CN={folder.name}", "-keyout", folder / "ca.key", "-out", self.ca)

    def issue(
        self, name: str, *, host: str = "IP:127.0.0.1", begins_days: int = -1, ends_days: int = 900
    ) -> Certificates:
        """A certificate for the account `name`, or for a broker at `host`, valid between these days from now."""
        request, certificate, key = (self._folder / f"{name}.{kind}" for kind in ("csr", "crt", "key"))
        subject = ("-subj", f"/CN={name}", "-addext", f"subjectAltName={host}")
        _openssl("req", *NEW_KEY, *subject, "-keyout", key, "-out", request)
        dates = ("-startdate", _day(begins_days), "-enddate", _day(ends_days))
        self._ca("-batch", "-notext", "-in", request, "-out", certificate, *dates)
        return Certificates(self.ca, certificate, key)

    def revoke(self, revoked: Certificates) -> None:
        """From now on `revoked`, a file for the broker, names it."""
        assert revoked.certificate is not None
        self._ca("-revoke", revoked.certificate)
        self._ca("-gencrl", "-out", self.revoked)

    def _ca(self, *arguments: str | Path) -> None:
        _openssl("ca", "-config", self._folder / "settings", *arguments)


def tls_listener(port: int, broker: Certificates, *settings: str) -> tuple[str, ...]:
    """Lines of mosquitto.conf: a listener that wants a certificate and takes its common name as the account."""
    return (
        f"listener {port} 127.0.0.1",
        f"cafile {broker.ca}",
        f"certfile {broker.certificate}",
        f"keyfile {broker.key}",
        "require_certificate true",
        "use_identity_as_username true",
        *settings,
    )


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _day(days: int) -> str:
    return (datetime.now(UTC) + timedelta(days=days)).strftime("%Y%m%d%H%M%SZ")
