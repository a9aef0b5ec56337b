"""What `packforcing serve` refuses before it listens."""

import socket

import pytest

from packforcing.app.cli.serve import page_url, token_for
from packforcing.errors import ConfigError
from tests.helpers import assert_refused, run, umt5_bundle


def test_a_model_that_reads_embeddings_needs_its_encoder(tmp_path):
    bundle = umt5_bundle(tmp_path)
    assert_refused(run("serve", bundle), "reads embeddings of umt5-xxl", "--encoder DIR")
    assert_refused(run("serve", bundle, "--encoder", tmp_path), "text encoder")
    assert_refused(run("serve", "--encoder", tmp_path), "leave out --encoder")


def test_mistakes_are_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert_refused(run("serve", "--port", port), f"port {port}", "choose another")
    assert_refused(run("serve", "--token", "guess"), "16 or more")
    assert_refused(run("serve", "--policy", "best"), "known policies: ")
    (tmp_path / "file").touch()
    assert_refused(run("serve", "--port", 0, "--out", tmp_path / "file" / "jobs"), "cannot use")


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("192.168.1.7", False), ("example.org", False)],
)  # fmt: skip
def test_a_token_is_needed_beyond_this_machine(host, local):
    token = token_for(host, None)
    assert (token is None) == local
    assert token is None or (len(token) >= 32 and token != token_for(host, None))
    assert token_for(host, "a secret of letters".replace(" ", "-")) == "a-secret-of-letters"
    for bad in ("short", "with spaces in it", "ünicode-of-many-letters"):
        with pytest.raises(ConfigError, match="16 or more"):
            token_for(host, bad)


def test_the_url_opens_the_page():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert page_url(listener, "::1", None) == f"http://[::1]:{port}/"
        assert page_url(listener, "box", "a/b&c") == f"http://box:{port}/?token=a%2Fb%26c"
        assert page_url(listener, "0.0.0.0", None) == f"http://{socket.gethostname()}:{port}/"
