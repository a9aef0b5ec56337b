"""Jobs over HTTP, as OpenAI's own client speaks to them, over a real socket."""

import pytest

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
