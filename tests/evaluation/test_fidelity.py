"""PSNR, SSIM and GMSD against their definitions; bundles compared, from frames to the page."""

import json
import re

import cv2
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from packforcing.app.cli import main
from packforcing.app.reports.plots import loss_plots
from packforcing.calibration.quantizer import quantize_bundle
from packforcing.evaluation.compare import Comparison
from packforcing.evaluation.fidelity import frame_fidelity, gmsd, ssim
from packforcing.evaluation.video_reader import read_frames
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.bundle import read_manifest
from tests.helpers import assert_one_line

PROMPT, SECONDS = "a green circle over gray dots", 0.5


def frames(seed: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 40, 52, 3), dtype=np.uint8)


def test_psnr_is_that_of_all_frames_and_equal_frames_have_none():
    a, b = frames(0), frames(1)
    b[0] = a[0]  # one frame equal: half of the error, 3.01 dB more than the other's
    close = frame_fidelity(a, b)
    assert close.psnr == pytest.approx(cv2.PSNR(a[1], b[1]) + 10 * np.log10(2))
    assert close.ssim == pytest.approx((1 + ssim(a[1], b[1])) / 2)
    assert close.gmsd == pytest.approx(gmsd(a[1], b[1]) / 2)
    assert frame_fidelity(a, a) == (None, 1, 0)
    with pytest.raises(ValueError, match="shorter"):
        frame_fidelity(a, b[:1])


def test_ssim_is_the_formula_in_every_window():
    """Means, variances and covariance of luma under a Gaussian of 11x11 pixels, one by one."""
    a, b = frames(2, 1)[0], frames(3, 1)[0]
    b = (0.7 * a + 0.3 * b).astype(np.uint8)
    weights = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(weights, weights) / weights.sum() ** 2
    x, y = (cv2.cvtColor(one, cv2.COLOR_RGB2GRAY).astype(float) for one in (a, b))
    values = []
    for row in range(x.shape[0] - 10):
        for column in range(x.shape[1] - 10):
            p, q = (one[row : row + 11, column : column + 11] for one in (x, y))
            m, n = (weights * p).sum(), (weights * q).sum()
            var_p, var_q = (weights * (p - m) ** 2).sum(), (weights * (q - n) ** 2).sum()
            both = (weights * (p - m) * (q - n)).sum()
            values.append(
                (2 * m * n + 6.5025) / (m * m + n * n + 6.5025)
                * (2 * both + 58.5225) / (var_p + var_q + 58.5225)
            )  # fmt: skip
    assert ssim(a, b) == pytest.approx(np.mean(values), abs=1e-6)
    assert 0.5 < ssim(a, b) < 1


def test_gmsd_is_the_formula_in_every_window():
    """Prewitt gradients of luma at half the size, one by one; an odd row or column is left out."""
    a, b = frames(4, 1)[0][:37, :51], frames(5, 1)[0][:37, :51]
    b = (0.6 * a + 0.4 * b).astype(np.uint8)
    magnitudes = []
    for picture in (a, b):
        luma = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(float)
        half = np.array([
            [luma[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean() for j in range(25)]
            for i in range(18)
        ])  # fmt: skip
        magnitudes.append([
            np.hypot(
                (half[i - 1 : i + 2, j - 1] - half[i - 1 : i + 2, j + 1]).sum() / 3,
                (half[i - 1, j - 1 : j + 2] - half[i + 1, j - 1 : j + 2]).sum() / 3,
            )
            for i in range(1, 17)
            for j in range(1, 24)
        ])  # fmt: skip
    x, y = map(np.array, magnitudes)
    assert gmsd(a, b) == pytest.approx(np.std((2 * x * y + 170) / (x * x + y * y + 170)))
    assert gmsd(a, b) > 0.05


def run(*args):
    return CliRunner().invoke(main, ["compare", *map(str, args), "--threads", "1"])


def test_bundles_are_compared_by_their_frames(tmp_path):
    quantize_bundle(demo_bundle(), tmp_path / "four", "int4")
    (tmp_path / "prompts.txt").write_text(PROMPT)
    out = tmp_path / "out"
    result = run(
        demo_bundle(), "--with", tmp_path / "four", "--seconds", SECONDS,
        "--prompts", tmp_path / "prompts.txt", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    comparison = msgspec.json.decode((out / "compare.json").read_bytes(), type=Comparison)
    first = demo_bundle().name
    assert list(comparison.costs) == [first, "four"]
    videos = []
    for bundle in (demo_bundle(), tmp_path / "four"):
        with Session.open(bundle, threads=1) as session:
            videos.append(np.concatenate(list(session.stream(PROMPT, SECONDS))))
    (close,) = comparison.fidelity["four"]
    assert close == pytest.approx(frame_fidelity(videos[1], videos[0]))
    assert f"PSNR {close.psnr:.4g} dB" in result.stdout
    assert comparison.costs["four"].precision.weights == "int4"
    whole, small = (comparison.costs[name] for name in (first, "four"))
    assert small.bundle < whole.bundle and small.device < whole.device
    listed = json.loads((tmp_path / "four" / "snr.json").read_text())
    assert comparison.snr == {"four": listed}
    quantized = {int(name.split(".")[1]) for name in listed}
    assert quantized == set(
        range(1, comparison.config.layers - 1)
    )  # all but the first and the last
    assert "snr.json" in read_manifest(tmp_path / "four").files
    assert comparison.unmeasured == ""
    losses = comparison.outputs["four"]
    flow = losses["flow"]
    assert flow.snr == pytest.approx(-20 * np.log10(flow.error))
    assert losses["v_new.0"].snr is None  # before any quantized layer
    least = min(loss.snr for name, loss in losses.items() if name.startswith("v_new.") and loss.snr)
    assert f"flow {flow.snr:.1f} dB" in result.stdout and f"v_new {least:.1f} dB" in result.stdout
    page = (out / "compare.html").read_text()
    texts = (f"{close.psnr:.1f} dB", next(iter(listed)), PROMPT, f"{flow.snr:.1f} dB, ")
    assert all(text in page for text in texts)
    for shown, pair in zip(re.findall(r'<video[^>]* src="([^"]*)"', page), comparison.pairs):
        assert shown == pair.video.replace(".mkv", ".mp4")  # a browser plays no FFV1
        lossless, copy = (np.stack(list(read_frames(out / name))) for name in (pair.video, shown))
        assert copy.shape == lossless.shape and cv2.PSNR(copy, lossless) > 30
    assert page.count("equal, 0") == 2  # keys and values of the first layer
    outputs = [name for name, loss in losses.items() if "." in name and loss.snr is not None]
    matrices, keys = loss_plots(comparison)
    assert matrices["svg"].count("fill: var(--line-1)") == len(listed)
    assert keys["svg"].count("fill: var(--line-1)") == len(outputs)
    (keys_alone,) = loss_plots(msgspec.structs.replace(comparison, snr={}))
    assert keys_alone["title"].startswith("dB of each key and value")
    assert keys_alone["title"] in page


def test_only_bundles_of_one_model_are_compared(tiny_bundle, tmp_path):
    bundle = demo_bundle()
    for args, message in (
        (("--with", tiny_bundle), "differs from the bundle it is compared with in more than"),
        (("--with", bundle), f"two of what is compared are called {bundle.name}"),
        (("--with", bundle, "--policies", "packforcing"), "leave one of them out"),
        (("--with", tmp_path / "none"), "none"),
    ):
        result = run(bundle, *args, "--out", tmp_path / "out")
        assert_one_line(result.exit_code, result.stdout, result.stderr, message)
        assert not list(tmp_path.rglob("*.mkv"))
