"""The endpoints against their own OpenAPI document, over a real socket, and with the real job."""
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra 'api' is not installed")
pytest.importorskip("schemathesis", reason="schemathesis is not installed")
import schemathesis  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from schemathesis.checks import positive_data_acceptance  # noqa: E402

from volcal.calibration.result import CalibrationResult  # noqa: E402
from volcal.ops.api import create_app  # noqa: E402
from volcal.ops.history import insert_calibration_history  # noqa: E402
from volcal.ops.jobs import AutoCalibration, job_hash  # noqa: E402
from volcal.ops.schedule import underlying_lock  # noqa: E402
from volcal.vol.overrides import clear_iv_multiplier_overrides  # noqa: E402
from volcal.vol.surface import VolSurface, get_synthetic_iv, set_applied_surface  # noqa: E402

ASK = "/api/calibration"
SAMPLE = Path(__file__).resolve().parents[1] / "data" / "sample"


@pytest.fixture(autouse=True)
def nothing_applied():
    yield
    clear_iv_multiplier_overrides()
    for asset in ("BTC", "ETH"):
        set_applied_surface(asset, None)


def quick_job(parameters, report_dir, db):
    """A run that is over at once."""
    row = {"underlying": parameters.underlying, "dte_min": parameters.dte_min, "dte_max": parameters.dte_max, "multiplier": 1.2,
           "lookback_days": parameters.lookback_days, "mae_pct": 7.0, "vega_weighted_mae_pct": 5.0, "num_samples": 400, "source": "harvested",
           "status": "ok", "reason": "every check passed", "config_hash": job_hash(parameters),
           "details": {"recommended_metrics": {"vega_sum": 3.0}}}
    result = CalibrationResult(underlying=parameters.underlying, recommended_iv_multiplier=1.2, status="ok", reason="every check passed")
    return AutoCalibration(parameters, result, history_id=insert_calibration_history(row, db))


def places(folder):
    return {"db": f"sqlite:///{folder}/history.db", "data_dir": str(SAMPLE), "report_dir": str(folder)}


FOLDER = tempfile.TemporaryDirectory(prefix="volcal_api_")
FUZZED = create_app(**places(FOLDER.name), job=quick_job)
schema = schemathesis.openapi.from_asgi("/openapi.json", FUZZED)


@pytest.fixture(scope="module")
def a_little_history():
    """Good, failed and bare runs."""
    url = places(FOLDER.name)["db"]
    TestClient(FUZZED).post(f"{ASK}/run_with_policy", json={"underlying": "BTC", "apply": True})
    bare = {"dte_min": 3, "dte_max": 10, "lookback_days": None}
    insert_calibration_history({**bare, "underlying": "BTC", "multiplier": None, "mae_pct": None, "num_samples": 0, "status": "failed"}, url)
    insert_calibration_history({**bare, "underlying": "ETH", "multiplier": 0.9, "mae_pct": 1e308, "num_samples": 1}, url)


@schema.parametrize()
@settings(max_examples=int(os.environ.get("VOLCAL_TEST_EXAMPLES", "30")), deadline=None, suppress_health_check=list(HealthCheck))
def test_every_endpoint_keeps_its_own_document(case, a_little_history):
    case.call_and_validate(excluded_checks=[positive_data_acceptance])  # what has no harvest or no run is refused, with a reason


def test_every_endpoint_of_the_specification_is_there():
    paths = create_app().openapi()["paths"]
    gets = {f"{ASK}/{name}" for name in ("history", "overrides", "policy", "current_multipliers", "auto_status")}
    posts = {f"{ASK}/{name}" for name in ("use_latest", "run_with_policy")}
    assert {path for path, item in paths.items() if "get" in item} == gets and {path for path, item in paths.items() if "post" in item} == posts


def test_use_latest_and_what_is_in_force(tmp_path):
    client = TestClient(create_app(**places(tmp_path), job=quick_job))
    refused = client.post(f"{ASK}/use_latest", json={"underlying": "BTC", "dte_min": 3, "dte_max": 10})
    assert refused.status_code == 400 and "it has no run" in refused.json()["detail"]
    client.post(f"{ASK}/run_with_policy", json={"underlying": "BTC"})
    assert client.get(f"{ASK}/current_multipliers").json()["multipliers"][0]["source"] == "config"
    used = client.post(f"{ASK}/use_latest", json={"underlying": "BTC", "dte_min": 3, "dte_max": 10}).json()
    assert {name: used[name] for name in ("underlying", "dte_min", "dte_max", "status", "multiplier", "mae_pct", "num_samples")} == {
        "underlying": "BTC", "dte_min": 3, "dte_max": 10, "status": "ok", "multiplier": 1.2, "mae_pct": 7.0, "num_samples": 400}
    assert float(get_synthetic_iv(VolSurface(), 0.5, 7, "BTC")[()]) == pytest.approx(0.6)
    kept = client.post(f"{ASK}/use_latest", json={"underlying": "BTC", "keep": True}).json()
    assert kept["kept"] and client.get(f"{ASK}/policy").json()["applied"]["by"] == "api"
    assert client.get(f"{ASK}/history", params={"underlying": "btc"}).json()["entries"][0]["applied"]


HOSTILE = {
    "NaN": b'{"underlying": "BTC", "dte_min": NaN}', "infinity": b'{"underlying": "BTC", "dte_max": -Infinity}',
    "beyond floats": b'{"underlying": "BTC", "dte_min": 1e999}',
    "half a character": b'{"underlying": "\\ud800"}', "half a character as a name": b'{"underlying": "BTC", "\\udfff": 1}',
    "five thousand digits": b'{"underlying": "BTC", "max_samples": ' + b"9" * 5000 + b"}",
    "four hundred digits": b'{"underlying": "BTC", "dte_min": ' + b"9" * 400 + b"}",
    "very deep": b"[" * 100_000, "half a body": b'{"underlying": "BT', "no text": b"\xff\xfe\x00", "empty": b"", "null": b"null", "a list": b"[1]",
    "other letters": '{"underlying": "ВТС"}'.encode(), "a path": b'{"underlying": "../BTC"}', "NUL": b'{"underlying": "BTC\\u0000"}',
    "a line": b'{"underlying": "BTC\\n"}'}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("name", ["use_latest", "run_with_policy"])
def test_a_hostile_body_is_refused_in_the_documented_form(tmp_path, name, body):
    client = TestClient(create_app(**places(tmp_path), job=quick_job), raise_server_exceptions=False)
    reply = client.post(f"{ASK}/{name}", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code in (400, 422) and set(reply.json()) == {"code", "detail"}
    assert client.get(f"{ASK}/history").json()["entries"] == []


def test_a_form_that_a_page_of_others_can_send_is_refused(tmp_path):
    client = TestClient(create_app(**places(tmp_path), job=quick_job))
    assert client.post(f"{ASK}/run_with_policy", content=b'{"underlying": "BTC"}', headers={"Content-Type": "text/plain"}).status_code == 422


def test_reports_that_cannot_be_written_are_the_servers_trouble(tmp_path):
    (tmp_path / "file").write_text("")
    client = TestClient(create_app(**{**places(tmp_path), "report_dir": str(tmp_path / "file")}, job=quick_job), raise_server_exceptions=False)
    reply = client.post(f"{ASK}/run_with_policy", json={"underlying": "BTC"})
    assert reply.status_code == 503 and "file" in reply.json()["detail"]


def test_a_long_run_answers_with_a_job_number_and_auto_status_has_the_end(tmp_path):
    gate = threading.Event()

    def slow(parameters, report_dir, db):
        gate.wait(60)
        return quick_job(parameters, report_dir, db)

    client = TestClient(create_app(**places(tmp_path), job=slow))
    begun = client.post(f"{ASK}/run_with_policy", json={"underlying": "BTC", "wait_seconds": 0.2, "apply": True})
    assert begun.status_code == 202 and begun.json()["state"] == "running" and begun.json()["reply"] is None
    assert client.post(f"{ASK}/run_with_policy", json={"underlying": "BTC"}).status_code == 409
    assert client.get(f"{ASK}/auto_status").json()["running"]
    gate.set()
    for _ in range(600):
        job = client.get(f"{ASK}/auto_status").json()["job"]
        if job["state"] != "running":
            break
        time.sleep(0.05)
    assert (job["state"], job["job_id"], job["reply"]["applied"]["multiplier"]) == ("done", begun.json()["job_id"], 1.2)
    assert client.post(f"{ASK}/run_with_policy", json={"underlying": "BTC"}).status_code == 200


def test_a_run_that_is_going_on_is_a_conflict(tmp_path):
    client = TestClient(create_app(**places(tmp_path), job=quick_job))
    with underlying_lock("BTC", tmp_path):
        assert client.get(f"{ASK}/auto_status").json()["running"]
        assert client.post(f"{ASK}/run_with_policy", json={"underlying": "BTC"}).status_code == 409
    assert not client.get(f"{ASK}/auto_status").json()["running"]


def test_the_real_job_on_the_sample(tmp_path):
    client = TestClient(create_app(**places(tmp_path)))
    body = {"underlying": "BTC", "as_of": "2025-10-15T23:00:00Z", "lookback_days": 2, "max_samples": 300, "apply": True}
    reply = client.post(f"{ASK}/run_with_policy", json=body)
    assert reply.status_code == 200, reply.text
    run = reply.json()
    assert run["history_id"] == 1 and run["status"] in ("ok", "degraded") and Path(run["report"]).is_dir()
    assert (run["applied"] is not None) == (run["decision"]["action"] == "apply")
    nothing = client.post(f"{ASK}/run_with_policy", json={**body, "as_of": "2024-01-01T00:00:00Z"}).json()
    assert nothing["status"] == "failed" and nothing["decision"]["action"] == "reject" and nothing["exit_code"] == 4
    assert [row["status"] for row in client.get(f"{ASK}/history").json()["entries"]][0] == "failed"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(port, *, host="127.0.0.1", token=None, folder):
    words = ["serve", "--host", host, "--port", str(port), "--db", f"sqlite:///{folder}/h.db", "--data-dir", str(SAMPLE), "--report-dir", str(folder)]
    env = {**os.environ, **({"VOLCAL_API_TOKEN": token} if token else {})}
    return subprocess.Popen([sys.executable, "-c", "from volcal.ops.cli import app\napp()", *words], stderr=subprocess.PIPE, text=True, env=env)


def first_answer(server, port, headers=None):
    """The history, once the server listens."""
    for _ in range(300):
        try:
            return httpx.get(f"http://127.0.0.1:{port}{ASK}/history", headers=headers)
        except httpx.TransportError:
            assert server.poll() is None, server.stderr.read()
            time.sleep(0.1)
    raise TimeoutError(port)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_ends_in_the_middle_of_a_run_leaves_nothing_in_the_way(tmp_path, ending):
    body = {"underlying": "BTC", "as_of": "2025-10-15T23:00:00Z", "lookback_days": 1, "max_samples": 200, "wait_seconds": 0}
    port = free_port()
    server = start(port, folder=tmp_path)
    first_answer(server, port)
    assert httpx.post(f"http://127.0.0.1:{port}{ASK}/run_with_policy", json=body).status_code == 202
    while not list((tmp_path / "BTC").glob("*.partial")):
        time.sleep(0.05)
    server.send_signal(ending)
    server.wait(20)
    client = TestClient(create_app(**places(tmp_path)))
    assert not client.get(f"{ASK}/auto_status").json()["running"]
    assert client.post(f"{ASK}/run_with_policy", json={**body, "wait_seconds": 300}).json()["status"] in ("ok", "degraded")
    killed = list((tmp_path / "BTC").glob("*.failed"))
    assert len(killed) == 1 and "killed" in (killed[0] / "error.txt").read_text()


@pytest.mark.parametrize("host,token", [("127.0.0.1", None), ("0.0.0.0", "0123456789abcdef")])
def test_served_on_a_socket(tmp_path, host, token):
    port = free_port()
    server = start(port, host=host, token=token, folder=tmp_path)
    try:
        reply = first_answer(server, port, {"Authorization": f"Bearer {token}"} if token else {})
        assert reply.json() == {"underlying": None, "entries": []}
        assert httpx.get(f"http://127.0.0.1:{port}{ASK}/history").status_code == (401 if token else 200)
        assert httpx.get(f"http://127.0.0.1:{port}/openapi.json").status_code == 200
    finally:
        server.terminate()
        server.wait(20)


def test_an_open_address_without_a_token_does_not_start(tmp_path):
    server = start(free_port(), host="0.0.0.0", folder=tmp_path)
    assert server.wait(60) != 0 and "VOLCAL_API_TOKEN" in server.stderr.read()
