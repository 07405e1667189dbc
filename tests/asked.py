"""What a client sends to a served model, the answer that it reads or leaves, and what the server counts."""

import http.client
import json
import socket
import ssl
import time
from contextlib import ExitStack, contextmanager

import numpy as np
import orjson

from tests.served import SIZE

IMAGES = np.random.default_rng(0).random((2, *SIZE), dtype=np.float32)
INFER = "/v2/models/bird/infer"
WIDE = np.zeros((4, *SIZE), np.float32)
WIDE_BYTES = 4 * 2**22


def send(address, method, path, body=None, headers=None, **options):
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        connection.request(method, path, body, headers or {}, **options)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def binary(images, target=None, outputs=None):
    """Body and headers of a request with binary tensors."""
    tensors = [("image", "FP32" if images.dtype == np.float32 else "UINT8", images)]
    if target is not None:
        tensors.append(("target", "INT64", np.asarray(target, np.int64)))
    inputs = [
        {"name": name, "datatype": kind, "shape": values.shape, "parameters": {"binary_data_size": values.nbytes}}
        for name, kind, values in tensors
    ]
    document = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    text = orjson.dumps(document | ({"outputs": outputs} if outputs else {}))
    body = b"".join([text, *(values.tobytes() for _, _, values in tensors)])
    return body, {"Inference-Header-Content-Length": str(len(text))}


def infer(address, images, target=None, model="bird"):
    """Status, and the outputs by name or the message of an error."""
    body, headers = binary(images, target)
    status, headers, body = send(address, "POST", f"/v2/models/{model}/infer", body, headers)
    if status != 200:
        return status, json.loads(body)["error"]
    length = int(headers["Inference-Header-Content-Length"])
    found, values = {}, np.frombuffer(body[length:], np.float32)
    for entry in json.loads(body[:length])["outputs"]:
        count = entry["parameters"]["binary_data_size"] // 4
        found[entry["name"]], values = values[:count].reshape(entry["shape"]), values[count:]
    return status, found


def metric(address, name, **labels):
    text = send(address, "GET", "/metrics")[2].decode()
    wanted = name + "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}"
    (line,) = [line for line in text.splitlines() if line.startswith(wanted + " ")]
    return float(line.rpartition(" ")[2])


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def unread(address, trusted=None):
    """A connection, by TLS if a certificate is trusted, on which 16 MiB come that nobody reads yet; see `read_all`."""
    body, headers = binary(WIDE, outputs=[{"name": "saliency_vbp"}])
    host, _, port = address.partition(":")
    with ExitStack() as stack:
        connection = stack.enter_context(socket.socket())
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        connection.settimeout(20)
        connection.connect((host, int(port)))
        if trusted:
            context = ssl.create_default_context(cafile=str(trusted))
            connection = stack.enter_context(context.wrap_socket(connection, server_hostname=host))
        fields = {"Host": "x", "Connection": "close", "Content-Length": len(body), **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        connection.sendall(f"POST {INFER} HTTP/1.1\r\n{head}\r\n".encode() + body)
        yield connection


def read_all(connection):
    """The answer's body, as much as comes."""
    pieces = []
    try:
        while piece := connection.recv(2**18):
            pieces.append(piece)
    except (ConnectionResetError, ssl.SSLError):
        pass
    return b"".join(pieces).partition(b"\r\n\r\n")[2]
