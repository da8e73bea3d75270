import shutil
import socket
import ssl
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from bora_fl.config import ConfigError
from bora_fl.deployment.certificates import make_client, make_server, make_site, sign


def handshake(folder: Path, name: str, authority: Path) -> str:
    """Serve one TLS connection with the server's certificate and return its protocol version as the client sees it."""
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(folder / "server.pem", folder / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            try:
                served.wrap_socket(connection, server_side=True).close()
            except OSError:
                connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            client = ssl.create_default_context(cafile=str(authority))
            client.verify_flags |= ssl.VERIFY_X509_STRICT
            with (
                socket.create_connection(listener.getsockname()) as plain,
                client.wrap_socket(plain, server_hostname=name) as secure,
            ):
                return str(secure.version())
        finally:
            thread.join()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "fed.example.org"])
def test_a_client_with_the_authority_connects_by_every_name(name: str, tmp_path: Path):
    make_server(tmp_path, ["fed.example.org", "localhost", "127.0.0.1"])
    assert handshake(tmp_path, name, tmp_path / "ca.crt") == "TLSv1.3"


def test_another_name_and_another_authority_are_refused(tmp_path: Path):
    make_server(tmp_path / "ours", ["localhost"])
    make_server(tmp_path / "theirs", ["localhost"])
    with pytest.raises(ssl.SSLCertVerificationError, match="ostname"):
        handshake(tmp_path / "ours", "fed.example.org", tmp_path / "ours" / "ca.crt")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path / "ours", "localhost", tmp_path / "theirs" / "ca.crt")


def test_site_keys_are_openssh_pairs_on_flowers_curve(tmp_path: Path):
    key, public, _ = make_site(tmp_path, "berlin")
    private = load_ssh_private_key(key.read_bytes(), None)
    assert private.public_key() == load_ssh_public_key(public.read_bytes())
    assert public.read_text().startswith("ecdsa-sha2-nistp384 ")
    assert public.read_text().endswith(" berlin\n")
    if shutil.which("ssh-keygen"):
        derived = subprocess.run(["ssh-keygen", "-y", "-f", key], capture_output=True, text=True, check=True).stdout
        assert derived.split()[:2] == public.read_text().split()[:2]


def test_only_the_owner_reads_secrets(tmp_path: Path):
    made = [*make_server(tmp_path / "server", ["localhost"]), *make_site(tmp_path / "site", "a")]
    made += make_client(tmp_path / "site", "a")
    public = {"ca.crt", "server.pem", "a.key.pub", "a.csr", "uplink.pem"}
    assert {path.name for path in made if stat.S_IMODE(path.stat().st_mode) != 0o600} == public


def test_nothing_is_overwritten_not_even_in_part(tmp_path: Path):
    make_site(tmp_path, "a")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"site\.key is there already"):
        make_site(tmp_path, "a")
    (tmp_path / "site.key").rename(tmp_path / "old.key")
    with pytest.raises(ConfigError, match=r"superexec\.secret is there already"):
        make_site(tmp_path, "b")
    (tmp_path / "old.key").rename(tmp_path / "site.key")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("role", ["site", "operator"])
def test_the_signer_says_what_a_client_is(role: str, tmp_path: Path):
    make_server(tmp_path, ["localhost"])
    key, request, *_ = make_client(tmp_path / "theirs", "berlin")
    signed = x509.load_pem_x509_certificate(sign(request, role, tmp_path).read_bytes())
    assert signed.subject.rfc4514_string() == f"CN=berlin,OU={role}"
    assert signed.public_key() == load_pem_private_key(key.read_bytes(), None).public_key()
    usage = signed.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]  # it cannot pose as the server
    signed.verify_directly_issued_by(x509.load_pem_x509_certificate((tmp_path / "ca.crt").read_bytes()))
    with pytest.raises(ConfigError, match=r"berlin\.crt is there already"):
        sign(request, role, tmp_path)


@pytest.mark.parametrize("name", ["a,OU=operator", "", "a/b", "x" * 65])
def test_a_name_cannot_smuggle_a_role(name: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="client's name"):
        make_client(tmp_path, name)


def test_a_request_that_is_none_is_refused(tmp_path: Path):
    make_server(tmp_path, ["localhost"])
    (tmp_path / "eve.csr").write_bytes((tmp_path / "server.pem").read_bytes())
    with pytest.raises(ConfigError, match="cannot be signed"):
        sign(tmp_path / "eve.csr", "site", tmp_path)


def test_a_supernode_takes_the_uplinks_certificate(tmp_path: Path):
    _, _, shown, key = make_client(tmp_path, "berlin")
    shown.rename(tmp_path / "server.pem")
    key.rename(tmp_path / "server.key")
    assert handshake(tmp_path, "localhost", tmp_path / "server.pem") == "TLSv1.3"


def test_a_server_needs_a_name(tmp_path: Path):
    with pytest.raises(ConfigError, match="--host"):
        make_server(tmp_path, [])


@pytest.mark.parametrize("host", ["https://fed.example.org", "fed.example.org:8443", "köln.example.org", "", "a b"])
def test_what_is_no_host_is_said_before_anything_is_written(host: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--host '.*is no DNS name or IP address"):
        make_server(tmp_path, ["localhost", host])
    assert not list(tmp_path.iterdir())


def test_a_site_s_name_that_is_none_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(ConfigError, match="'köln': a client's name has letters"):
        make_site(tmp_path, "köln")
    assert not list(tmp_path.iterdir())
