"""Three models that are served, and a certificate to serve by HTTPS with."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from keyed_xai.serving.service import ServeSettings
from tests.served import LIMIT, make_runtime, make_service, running


@pytest.fixture(scope="module")
def runtime():
    return make_runtime()


@pytest.fixture(scope="module")
def address(runtime):
    """Where three models are served."""
    models = {"bird": runtime, "eight.bits": make_runtime(pixels="uint8"), "vbp": make_runtime(targeted=False)}
    with running(make_service(models, ServeSettings(max_body=LIMIT))) as address:
        yield address


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 that signs itself, and its private key."""
    folder = tmp_path_factory.mktemp("https")
    secret = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(secret.public_key())
    builder = builder.serial_number(1).not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False)
    signed = builder.sign(secret, hashes.SHA256())
    (folder / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        secret.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return folder / "cert.pem", folder / "key.pem"
