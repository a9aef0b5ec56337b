"""Requests of every kind, made of the API's own description: none is a fault of the server."""

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

from tests.serving import call_route, serving

STATUSES = {200, 400, 404, 405, 408, 409, 413, 415, 416, 422, 429, 503, 507}


@pytest.fixture(scope="module")
def server(tiny_bundle, tmp_path_factory):
    with serving(tiny_bundle, tmp_path_factory.mktemp("fuzzed") / "jobs") as server:
        yield server


def fuzz(server, examples):
    """Send generated requests to every route; return how many."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    count = 0
    for operation in (result.ok() for result in schema.get_all_operations()):
        if operation.path == "/v1/live/video":  # its answer would end with the live video alone
            call_route(server.url, "/v1/live/stop")

        @hypothesis.seed(23)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def send(case):
            nonlocal count
            count += 1
            answer = case.call()
            assert answer.status_code in STATUSES, (case.as_curl_command(), answer.text)
            assert "Traceback" not in answer.text
            if answer.status_code >= 400:
                assert set(answer.json()) == {"error"}, answer.text

        send()
    return count


def check_folder(server):
    """Nothing lies beside the jobs, and they all answer."""
    folder = server.service.store.folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    for path in folder.iterdir():
        assert path.name.startswith(("video_", "server.lock")), path


def test_no_request_is_a_fault_of_the_server(server):
    assert fuzz(server, 8) > 80
    check_folder(server)


@pytest.mark.full
def test_no_request_of_thousands_is_a_fault_of_the_server(server):
    print(f"{fuzz(server, 400):,} requests")
    check_folder(server)
