"""A bundle in fp16 with two layers that can be quantized, its statistics, quantized bundles."""

from pathlib import Path

import msgspec
import pytest

from packforcing.calibration.activations import calibrate
from packforcing.calibration.quantizer import quantize_bundle
from packforcing.calibration.recipes import CACHE_RECIPES, INPUT_RECIPES, WEIGHT_RECIPES
from packforcing.config import Precision
from packforcing.export import export_bundle
from packforcing.model import random_weights
from tests.helpers import CALIBRATION_PROMPTS, DEEP


@pytest.fixture(scope="package")
def half_bundle(tmp_path_factory) -> Path:
    """DEEP in fp16, with random weights."""
    half = Precision(compute="fp16", weights="fp16", cache="fp16")
    config = msgspec.structs.replace(DEEP, precision=half)
    directory = tmp_path_factory.mktemp("bundles") / "deep"
    export_bundle(config, random_weights(config), directory)
    return directory


@pytest.fixture(scope="package")
def calibrated(half_bundle, tmp_path_factory) -> Path:
    """Activation statistics of two videos."""
    path = tmp_path_factory.mktemp("statistics") / "s.safetensors"
    calibrate(half_bundle, CALIBRATION_PROMPTS, path, seconds=3)
    return path


@pytest.fixture(scope="package", params=WEIGHT_RECIPES)
def quantized(request, half_bundle, calibrated, tmp_path_factory) -> Path:
    """Bundles with quantized weights, fitted to statistics where inputs are quantized too."""
    directory, dtype = tmp_path_factory.mktemp("bundles") / request.param, request.param
    statistics = calibrated if dtype in INPUT_RECIPES else None
    quantize_bundle(half_bundle, directory, dtype, None, statistics)
    return directory


@pytest.fixture(scope="package", params=CACHE_RECIPES)
def quantized_cache(request, half_bundle, calibrated, tmp_path_factory) -> Path:
    """Bundles with a quantized cache."""
    directory = tmp_path_factory.mktemp("bundles") / "cache"
    quantize_bundle(half_bundle, directory, None, request.param, calibrated)
    return directory
