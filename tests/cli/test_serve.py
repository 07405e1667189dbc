"""`keyed-xai serve` as a process: it needs no PyTorch, answers, and stops without losing a request."""

import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from tritonclient import http as triton

from keyed_xai_cli import main as cli
from tests.served import SIZE, by_hand, write_model

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["torchvision"] = None
from keyed_xai_cli.main import main
main(prog_name="keyed-xai")
"""


@contextmanager
def serving(*arguments):
    """The process, its first line, and the address in it; killed at the end if it is still there."""
    command = [sys.executable, "-c", WITHOUT_TORCH, "serve", *map(str, arguments), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    watch = threading.Timer(60, process.kill)
    watch.start()
    try:
        line = process.stderr.readline()
        found = re.search(r"http://(127\.0\.0\.1:\d+)/v2", line)
        assert found, line + process.stderr.read()
        yield process, line, found[1]
    finally:
        watch.cancel()
        if process.poll() is None:
            process.kill()
        process.communicate()


def refuse(*arguments):
    result = CliRunner().invoke(cli.main, ["serve", *map(str, arguments)])
    assert result.exit_code in (1, 2), result.output
    return result.exit_code, result.stderr


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_stopping_finishes_what_is_inside(tmp_path, ending):
    model = write_model(tmp_path / "bird.onnx")
    images = np.random.default_rng(0).random((2, *SIZE), dtype=np.float32)
    # All wait for more to share their batch, until the signal says that none will come.
    with serving(model, "--max-delay", 10_000, "--max-batch", 64) as (process, line, address):
        assert "bird (gradcam, vbp; CPUExecutionProvider)" in line
        assert "No key is held here" in line

        def ask(_):
            with triton.InferenceServerClient(address) as client:
                tensor = triton.InferInput("image", list(images.shape), "FP32")
                tensor.set_data_from_numpy(images)
                return client.infer("bird", [tensor]).as_numpy("saliency_gradcam")

        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(ask, number) for number in range(4)]
            while inside(address) < 4:
                pass
            process.send_signal(ending)
            expected = by_hand(images)["saliency_gradcam"]
            for each in waiting:
                np.testing.assert_allclose(each.result(), expected, atol=1e-5)
        out, error = process.communicate(timeout=20)
        assert process.returncode == 0
        assert (out, error) == ("", "Stopped.\n")


TOLD_AT_ONCE = """
import os, signal, sys
from pathlib import Path
from keyed_xai.serving.server import BindAddress, serve
from keyed_xai.serving.service import open_service
service = open_service([Path(sys.argv[1])], device="cpu", threads=1)
serve(service, BindAddress(port=0), on_ready=lambda url: os.kill(os.getpid(), int(sys.argv[2])))
"""


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_signal_right_after_the_first_line_stops_it_in_order(tmp_path, ending):
    model = write_model(tmp_path / "bird.onnx")
    command = [sys.executable, "-c", TOLD_AT_ONCE, str(model), str(int(ending))]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def inside(address):
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return float(re.search(r'^keyed_xai_in_flight_requests{model="bird"} (.+)$', text, re.MULTILINE)[1])


def test_several_models_and_the_access_log(tmp_path):
    models = [write_model(tmp_path / "bird.onnx"), write_model(tmp_path / "cat.onnx", targeted=False)]
    with serving(*models, "--access-log", "--threads", 1) as (process, line, address):
        assert "cat (vbp; CPUExecutionProvider)" in line
        assert f"a page for people at http://{address}/." in line
        with urllib.request.urlopen(f"http://{address}/", timeout=10) as answer:
            assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        request = urllib.request.Request(f"http://{address}/v2/repository/index", method="POST")
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert [each["name"] for each in json.load(answer)] == ["bird", "cat"]
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=20)
    assert '"POST /v2/repository/index HTTP/1.1" 200' in error


def test_page_is_left_out_on_request(tmp_path):
    with serving(write_model(tmp_path / "bird.onnx"), "--no-page") as (_, line, address):
        assert "page" not in line
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://{address}/", timeout=10)


def test_wrong_files_and_options_are_named(tmp_path):
    model = write_model(tmp_path / "bird.onnx")
    (tmp_path / "text.onnx").write_text("text")
    (tmp_path / "sub").mkdir()
    twin = write_model(tmp_path / "sub" / "bird.onnx")
    unsafe = write_model(tmp_path / "my bird.onnx")
    for arguments, code, expected in (
        ([], 2, "Missing argument 'MODELS"),
        ([tmp_path / "none.onnx"], 2, "does not exist"),
        ([tmp_path / "text.onnx"], 1, "is not an ONNX model"),
        ([model, twin], 1, "Two files would be served as 'bird'"),
        ([unsafe], 1, "Rename the file"),
        ([model, "--device", "gpu"], 2, "expected auto, cpu, cuda, cuda:N or tensorrt"),
        ([model, "--max-batch", "0"], 2, "max-batch"),
        ([model, "--ssl-keyfile", model], 2, "--ssl-keyfile needs --ssl-certfile"),
        ([model, "--ssl-certfile", model, "--device", "cpu"], 1, "certificate cannot be used"),
        ([model, "--host", "no.such.host.invalid", "--device", "cpu"], 1, "Cannot listen on no.such.host.invalid"),
    ):
        assert refuse(*arguments)[0] == code
        assert expected in " ".join(refuse(*arguments)[1].split())


def memory_of(process):
    """Resident, in bytes."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_goes_back_after_large_pictures_and_half_requests(tmp_path):
    def explain(picture):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=1)
        request = urllib.request.Request(f"http://{address}/v2/models/bird/explain", buffer.getvalue())
        request.add_header("Content-Type", "image/png")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status

    with serving(write_model(tmp_path / "bird.onnx")) as (process, _, address), ExitStack() as stack:
        assert explain(Image.new("RGB", (64, 64))) == 200
        before = memory_of(process)
        with ThreadPoolExecutor(2) as pool:
            pictures = [Image.new("RGB", (5000, 5000)), Image.new("LA", (5000, 5000))] * 2
            assert list(pool.map(explain, pictures)) == [200] * 4
        host, _, port = address.partition(":")
        for _ in range(200):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            connection.sendall(b"POST /v2/models/bird/infer HTTP/1.1\r\nContent-Length: 99999\r\nA: " + b"a" * 12_000)
        stack.close()
        assert explain(Image.new("RGB", (64, 64))) == 200
        assert memory_of(process) < 1.5 * before
