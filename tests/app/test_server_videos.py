"""Jobs over HTTP, as OpenAI's own client speaks to them, over a real socket."""

import http.client
import io
import json
import logging
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from tests.helpers import frames_of
from tests.serving import serving

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of OpenAI's route

PROMPT = "a red star over navy stripes"


@pytest.fixture(scope="module")
def server(tiny_bundle, tmp_path_factory):
    with serving(tiny_bundle, tmp_path_factory.mktemp("serve")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    from openai import OpenAI

    return OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0)


def test_a_video_is_created_polled_downloaded_and_deleted(server, client, tmp_path):
    video = client.videos.create_and_poll(
        prompt=PROMPT, model="tiny", seconds="2", extra_body={"seed": 7}, poll_interval_ms=50
    )
    assert (video.status, video.progress, video.seed) == ("completed", 100, 7)
    client.videos.download_content(video.id).write_to_file(tmp_path / "video.mp4")
    assert frames_of(tmp_path / "video.mp4").shape == (16, 64, 96, 3)
    assert [other.id for other in client.videos.list()] == [video.id]
    assert client.videos.delete(video.id).deleted
    assert not [*client.videos.list()]
    assert [path.name for path in server.service.store.folder.iterdir()] == ["server.lock"]


@pytest.fixture(scope="module")
def video(client):
    """One that is completed; the first frame is red."""
    picture = io.BytesIO()
    Image.new("RGB", (48, 32), "red").save(picture, "PNG")
    video = client.videos.create_and_poll(
        prompt=PROMPT,
        seconds="2",
        size="96x64",
        input_reference=("red.png", picture.getvalue(), "image/png"),
        extra_body={"seed": 7, "start_fit": "stretch", "policy": "sink-window"},
        poll_interval_ms=50,
    )
    assert (video.status, video.policy) == ("completed", "sink-window")
    return video


def ask(server, method, path, body=None, headers=()):
    """Return status, headers and body of an answer; the path goes out as it is."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
    fields = {} if body is None else {"content-type": "application/json"}
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, data, {**fields, **dict(headers)})
    answer = connection.getresponse()
    with answer:
        return answer.status, answer.headers, answer.read()


def test_parts_of_a_video_and_its_first_frame(server, client, video):
    path = f"/v1/videos/{video.id}/content"
    whole = client.videos.download_content(video.id).read()
    for ranges, start, stop in (("5-9", 5, 10), ("-7", len(whole) - 7, len(whole))):
        status, headers, data = ask(server, "GET", path, headers={"range": f"bytes={ranges}"})
        assert (status, data) == (206, whole[start:stop])
        assert headers["content-range"] == f"bytes {start}-{stop - 1}/{len(whole)}"
    assert ask(server, "GET", path, headers={"range": f"bytes={len(whole)}-"})[0] == 416
    assert ask(server, "GET", path, headers={"range": "lines=1-2"})[2] == whole
    data = client.videos.download_content(video.id, variant="thumbnail").read()
    frame = np.asarray(Image.open(io.BytesIO(data)))
    assert frame.shape == (64, 96, 3)


def test_a_remix_is_the_same_video_again_or_one_of_another_prompt(server, client, video):
    status, _, body = ask(server, "POST", f"/v1/videos/{video.id}/remix", {})
    again = client.videos.poll(json.loads(body)["id"], poll_interval_ms=50)
    assert status == 200 and again.remixed_from_video_id == video.id
    assert (again.seed, again.policy, again.seconds) == (7, "sink-window", "2")
    contents = [client.videos.download_content(name).read() for name in (video.id, again.id)]
    assert contents[0] == contents[1]
    other = client.videos.remix(video.id, prompt="a blue circle over sand")
    assert (other.prompt, other.seed) == ("a blue circle over sand", 7)
    for made in (again, other):
        client.videos.delete(made.id)


def test_a_schedule_comes_back_as_it_went_in(server, client):
    entries = [
        {"time": 0.0, "prompt": PROMPT, "history": None, "over": 1, "block": None},
        {"time": 3.0, "prompt": "a blue circle", "history": "cut", "over": 1, "block": 3},
    ]
    fields = {"schedule": entries, "seconds": 5, "seed": 2**64 - 1}
    made = json.loads(ask(server, "POST", "/v1/videos", fields)[2])
    assert (made["schedule"], made["seed"]) == (entries, 2**64 - 1)
    status, headers, toml = ask(server, "GET", f"/v1/videos/{made['id']}/schedule")
    assert status == 200 and "attachment" in headers["content-disposition"]
    again = json.loads(ask(server, "POST", "/v1/videos", {**fields, "schedule": toml.decode()})[2])
    assert again["schedule"] == entries
    for name in (made["id"], again["id"]):
        cancelled = json.loads(ask(server, "POST", f"/v1/videos/{name}/cancel")[2])
        assert cancelled["status"] == "failed" and cancelled["error"]["code"] == "cancelled"
        assert ask(server, "GET", f"/v1/videos/{name}/content")[0] == 400
        client.videos.delete(name)


def test_a_list_comes_in_pages(server, client, video):
    made = [client.videos.create(prompt=PROMPT, seconds="1").id for _ in range(3)]
    assert [job.id for job in client.videos.list(limit=2)] == [*reversed(made), video.id]
    page = client.videos.list(limit=2, order="asc", after=video.id)
    assert ([job.id for job in page.data], page.has_more) == (made[:2], True)
    client.videos.delete(made[0])
    assert [job.id for job in client.videos.list(order="asc", after=made[0])] == made[1:]
    for name in made[1:]:
        client.videos.delete(name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "1280x720"}, "size must be 96x64"),
        ({"model": "sora-2"}, "the model 'tiny'"),
        ({"prompt": "a red dragon"}, "does not know 'dragon'"),
        ({"seconds": "0"}, "seconds must be above 0"),
        ({"seconds": "nan"}, "seconds must be above 0"),
        ({"seconds": "long"}, "seconds must be a number"),
        ({"seconds": 10**400}, "seconds"),
        ({"seed": -1}, "seed must be from 0"),
        ({"policy": "best"}, "policy must be one of packforcing, "),
        ({"color": "red"}, "unknown field 'color'"),
        ({"schedule": "x = 1"}, "give either"),
        ({"prompt": None, "schedule": "[[switch]]\ntime=0\nembedding='/etc/passwd'"}, "no file"),
        ({"prompt": None, "schedule": [{"time": 1, "prompt": PROMPT}]}, "begin at time 0"),
        ({"archive_limit": 1}, "archive_limit must be"),
        ({"input_reference": "https://example.org/a.png"}, "nothing is fetched"),
        ({"input_reference": "data:image/png;base64,AAAA"}, "cannot start from it"),
        ({"prompt": "\ud800"}, "JSON"),
        ({"prompt": "red " * 5000}, "at most 10000"),
        ({"user": "me", "seconds": "1", "prompt": ""}, "names nothing to draw"),
    ],
)
def test_a_mistake_is_named(server, fields, message):
    status, _, body = ask(server, "POST", "/v1/videos", {"prompt": PROMPT, **fields})
    error = json.loads(body)["error"]
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert message in error["message"] and "\n" not in error["message"]


def test_openai_s_client_sees_its_own_errors(client):
    import openai

    with pytest.raises(openai.BadRequestError, match="size must be 96x64"):
        client.videos.create(prompt=PROMPT, size="1280x720")
    with pytest.raises(openai.NotFoundError, match="no video of this ID"):
        client.videos.retrieve("video_0")
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "packforcing"


@pytest.mark.parametrize(
    "name",
    ["../server", "..%2Fserver", "%2e%2e%2fserver.lock", "video_%00", "/etc/passwd", ".", "..",
     "video_0000000000000000000000000", "server.lock", "%ff", "VIDEO_000000000000000000000000"],
)  # fmt: skip
def test_no_name_leads_out_of_the_folder(server, name):
    for path in (name, f"{name}/content", f"{name}/schedule"):
        assert ask(server, "GET", f"/v1/videos/{path}")[0] in (404, 405)
    assert ask(server, "DELETE", f"/v1/videos/{name}")[0] in (404, 405)
    for path in (f"/page/{name}", f"/page/../videos.py?{name}", "/page/%2e%2e/videos.py"):
        assert ask(server, "GET", path)[0] == 404


def test_logs_have_neither_prompts_nor_paths(server, client, caplog):
    with caplog.at_level(logging.INFO):
        made = client.videos.create_and_poll(prompt=PROMPT, seconds="1", poll_interval_ms=20)
        ask(server, "POST", "/v1/videos", {"prompt": "a secret"})
        client.videos.delete(made.id)
    lines = [record.getMessage() for record in caplog.records if "packforcing" in record.name]
    assert any(line.startswith(f"job {made.id}: completed") for line in lines)
    assert not any(word in line for line in lines for word in ("star", "secret", "/"))


def test_the_page_and_the_documentation_come_from_here(server):
    for path in ("/", "/docs", "/openapi.json", "/page/style.css"):
        status, headers, body = ask(server, "GET", path)
        assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
        assert b"https://cdn" not in body
