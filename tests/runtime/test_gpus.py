"""Figures of GPUs: rates against what NVIDIA publishes, and the names by which people know them."""

import tomllib
from fractions import Fraction
from pathlib import Path

import pytest

from packforcing.errors import BackendError, ConfigError
from packforcing.runtime import gpus, nvml
from packforcing.runtime.gpus import find_gpu, known_gpus, parse_rates
from packforcing.runtime.plan import TARGETS

# "AI TOPS" of NVIDIA's product pages: sparse, which is twice dense, in the narrowest float that a
# generation has; on Ada with sums in fp16
AI_TOPS = {
    "RTX 4060": 242, "RTX 4060 Ti": 353, "RTX 4070": 466, "RTX 4070 SUPER": 568,
    "RTX 4070 Ti": 641, "RTX 4070 Ti SUPER": 706, "RTX 4080": 780, "RTX 4080 SUPER": 836,
    "RTX 4090": 1321, "RTX 4090 D": 1177, "RTX 4050 Laptop 115W": 194,
    "RTX 4060 Laptop 115W": 233, "RTX 4070 Laptop 115W": 321, "RTX 4080 Laptop 150W": 542,
    "RTX 5050": 421, "RTX 5060": 614, "RTX 5060 Ti": 759, "RTX 5070": 988, "RTX 5070 Ti": 1406,
    "RTX 5080": 1801, "RTX 5090": 3352,
}  # fmt: skip


# Tensor cores per SM, and multiply-adds of each per clock in fp16
TENSOR_CORES = {
    "sm75": (8, 64), "sm86": (4, 128), "sm87": (4, 256), "sm89": (4, 128), "sm110": (4, 1024),
    "sm120": (4, 128), "sm121": (4, 128),
}  # fmt: skip
TIMES_FP16 = {"fp16": 1, "int8": 2, "fp8": 2, "nvfp4": 4}
HALVED = {"fp16", "fp8"}  # with sums in fp32, on GeForce

TABLE = tomllib.loads(Path(gpus.__file__).with_name("gpus.toml").read_text(encoding="utf-8"))
ROWS = [(series, *row) for series in TABLE["series"] for row in series["gpus"]]


def exact_rate(series, sms, mhz, dtype):
    """Return TFLOPS from the number of tensor cores, without rounding."""
    if dtype == "fp32":
        lanes = 64 if series["target"] == "sm75" else 128
        return Fraction(2 * sms * lanes * mhz, 10**6)
    cores, multiply_adds = TENSOR_CORES[series["target"]]
    rate = Fraction(2 * sms * cores * multiply_adds * TIMES_FP16[dtype] * mhz, 10**6)
    return rate / 2 if series["name"].startswith("GeForce") and dtype in HALVED else rate


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[1]} {row[4]} GB {row[6:]}")
def test_rates_are_those_of_the_tensor_cores_at_the_clock(row):
    """At both ends of a laptop's power and in each mode of a module, to float64's rounding."""
    series, name, sms, clocks, memory, bandwidth, *power = row
    modes = power if power and isinstance(power[0], str) else [""]
    ends = modes if isinstance(clocks, int) else [f"{watts}W" for watts in power[0]]
    for end, mhz in zip(ends, [clocks] if isinstance(clocks, int) else clocks, strict=True):
        gpu = find_gpu(f"{name} {memory} GB {end}")
        assert (gpu.target, gpu.memory, gpu.bandwidth) == (series["target"], memory, bandwidth)
        assert gpu.tflops.keys() == {*series["dtypes"], "fp32"}
        for dtype, rate in gpu.tflops.items():
            exact = float(exact_rate(series, sms, mhz, dtype))
            assert rate == pytest.approx(exact, rel=1e-13), f"{gpu.name}: {dtype}"


def test_every_series_has_a_source_that_was_read():
    for series in TABLE["series"]:
        assert any(source.endswith("(read)") for source in series["sources"]), series["name"]


@pytest.mark.parametrize(("name", "tops"), AI_TOPS.items())
def test_rates_are_those_that_nvidia_states(name, tops):
    gpu = find_gpu(name)
    dense = gpu.tflops["nvfp4"] if gpu.target == "sm120" else 2 * gpu.tflops["fp8"]
    assert 2 * dense == pytest.approx(tops, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [  # tables of the whitepapers, with fp32 accumulation
        ("RTX 2080 Ti", "fp16", 53.8),
        ("Quadro RTX 6000", "fp16", 130.5),
        ("RTX 3080", "fp16", 59.5),
        ("RTX 3090", "int8", 284),
        ("RTX A6000", "fp16", 154.8),
        ("RTX 4090", "fp16", 165.2),
        ("RTX 4090", "fp8", 330.3),
        ("RTX 4090", "int8", 660.6),
        ("RTX 6000 Ada", "fp8", 728.5),
        ("RTX 5090", "fp8", 419),
        ("RTX 5090", "nvfp4", 1676),
        ("RTX 5090", "fp32", 104.8),
    ],
)
def test_rates_are_those_of_the_whitepapers(name, dtype, tflops):
    assert find_gpu(name).tflops[dtype] == pytest.approx(tflops, rel=3e-3)


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [  # what NVIDIA's data sheets state of Turing is dense, of the others sparse
        ("Quadro RTX 5000", "fp16", 89.2),
        ("RTX A400", "fp16", 21.7 / 2),
        ("RTX A400", "int8", 43.3 / 2),
        ("RTX A2000", "fp16", 63.9 / 2),
        ("RTX A4000", "fp16", 153.4 / 2),
        ("RTX A4500", "fp16", 189.2 / 2),
        ("RTX A5000", "fp16", 222.2 / 2),
        ("RTX A5500", "fp16", 272.8 / 2),
        ("RTX A6000", "fp16", 309.7 / 2),
        ("RTX 2000 Ada", "fp8", 191.9 / 2),
        ("RTX 4000 SFF Ada", "fp8", 306.8 / 2),
        ("RTX 4000 Ada", "fp8", 427.6 / 2),
        ("RTX 4500 Ada", "fp8", 637.8 / 2),
        ("RTX 5000 Ada", "fp8", 1044 / 2),
        ("RTX 5880 Ada", "fp8", 1108 / 2),
        ("RTX PRO 6000 Blackwell", "fp16", 503.8),
        ("RTX PRO 5000 Blackwell", "nvfp4", 2064 / 2),
    ],
)
def test_rates_are_those_of_the_data_sheets(name, dtype, tflops):
    assert find_gpu(name).tflops[dtype] == pytest.approx(tflops, rel=7e-3)


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [  # products of large matrices with fp32 sums, measured by others; gpus.toml says by whom
        ("RTX 2070", "fp16", 31.5),
        ("RTX 2080", "fp16", 39.0),
        ("RTX 2080 Ti", "fp16", 58.6),
        ("RTX 3060", "fp16", 24.8),
        ("RTX 3070", "fp16", 43.0),
        ("RTX 3080", "fp16", 64.1),
        ("RTX 3090", "fp16", 75.6),
        ("RTX A2000 12 GB", "fp16", 36.0),
        ("RTX A4000", "fp16", 65.4),
        ("RTX A6000", "fp16", 120.5),
        ("RTX 4060", "fp16", 32.6),
        ("RTX 4080", "fp8", 209.4),
        ("RTX 4080", "int8", 408.6),
        ("RTX 4090", "fp16", 165.1),
        ("RTX 5060", "fp16", 39.6),
        ("RTX 5060 Ti", "fp16", 47.0),
        ("RTX 5060 Ti", "nvfp4", 341.9),
        ("RTX 5070", "fp16", 67.4),
        ("RTX 5080", "fp16", 102.4),
        ("RTX 5090", "fp16", 224.4),
        ("RTX PRO 6000 Blackwell", "fp16", 315.5),
        ("DGX Spark", "fp16", 96.8),
        ("DGX Spark", "fp8", 188),
        ("DGX Spark", "nvfp4", 356),
        ("Orin Nano 8GB", "fp16", 10.2),
    ],
)
def test_measured_rates_are_near_the_peak(name, dtype, tflops):
    """A rate half or twice of what it should be would be outside; boards exceed stated clocks."""
    assert 0.6 < tflops / find_gpu(name).tflops[dtype] < 1.2


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [  # what NVIDIA states is sparse: twice the dense rate
        ("AGX Orin 64GB MAXN", "int8", 171 / 2),  # by mode, at clocks of JetPack 5: up to 2% higher
        ("AGX Orin 64GB 50W", "int8", 109 / 2),
        ("AGX Orin 64GB 30W", "int8", 41 / 2),
        ("Jetson Orin Nano 8 GB", "int8", 67 / 2),
        ("Jetson Orin Nano 4 GB", "int8", 34 / 2),
        ("Jetson AGX Orin 64 GB", "int8", 170 / 2),
        ("Jetson T5000", "nvfp4", 2070 / 2),
        ("Jetson T4000", "nvfp4", 1200 / 2),
    ],
)
def test_rates_of_modules_are_half_of_what_nvidia_states(name, dtype, tflops):
    assert find_gpu(name).tflops[dtype] == pytest.approx(tflops, rel=0.025)


def test_a_power_mode_has_its_units_clock_and_bandwidth():
    """AGX Orin at 30 W: half of its 16 SMs, at 612 MHz; at 15 W the memory is slower too."""
    whole, half, least = (find_gpu(f"AGX Orin 64 GB {mode}") for mode in ("MAXN", "30W", "15W"))
    ratio = 8 * 612 / (16 * 1300)
    assert half.tflops["fp16"] == pytest.approx(ratio * whole.tflops["fp16"])
    assert least.bandwidth < half.bandwidth == whole.bandwidth
    with pytest.raises(ConfigError, match=r"Nano 8 GB at 40 W; its modes .*: MAXN SUPER, 25W"):
        find_gpu("Orin Nano 8GB 40W")


def test_every_gpu_is_found_by_its_own_name():
    for name, gpu in known_gpus().items():
        assert find_gpu(name) == gpu


def test_every_gpu_is_one_that_engines_are_built_for():
    for gpu in known_gpus().values():
        assert gpu.target in TARGETS and gpu.memory > 0 < gpu.bandwidth
        assert {"fp32", "fp16", "int8"} <= gpu.tflops.keys()
        assert ("fp8" in gpu.tflops) == ("fp8" in TARGETS[gpu.target])


@pytest.mark.parametrize(
    "form",
    [
        "RTX {}", "rtx{}", "RTX-{}", "rtx_{}", "GeForce RTX {}", "geforce rtx{}", "{}",
        "NVIDIA GeForce RTX {}",  # nvidia-smi, NVML, torch, Windows
        "  NVIDIA  GeForce RTX {} ",
        "NVIDIA GEFORCE RTX {}",
        "NVIDIA GeForce RTX\u2122 {}", "NVIDIA(R) GeForce(TM) RTX {}",  # shops, NVIDIA's site
        "GPU 0: NVIDIA GeForce RTX {} (UUID: GPU-1c2f5a1e-9d3b-4060-8a52-0d6b8a4f5e6d)",
        "GPU 1 - NVIDIA GeForce RTX {}", "cuda:0 NVIDIA GeForce RTX {}",
        "GPU 0: NVIDIA GeForce RTX {}",
        "NVIDIA Corporation AD107 [GeForce RTX {}] (rev a1)",  # lspci
        "NVIDIA GeForce RTX {}/PCIe/SSE2",  # OpenGL
        "NVIDIA GeForce RTX {} Graphics", "NVIDIA GeForce RTX {} GPU",
    ],
)  # fmt: skip
def test_gpus_are_known_by_the_names_that_tools_print(form):
    for name, gpu in known_gpus().items():
        if name.startswith("RTX "):
            assert find_gpu(form.format(name.removeprefix("RTX "))) == gpu


@pytest.mark.parametrize(
    ("name", "full_name"),
    [
        ("3060", "RTX 3060 12 GB"),
        ("NVIDIA GeForce RTX 4060, 8188 MiB", "RTX 4060"),  # --query-gpu=name,memory.total
        ("RTX 3060 8GB", "RTX 3060 8 GB"),
        ("NVIDIA GeForce RTX 3050 Laptop GPU, 4096 MiB", "RTX 3050 Laptop 4 GB 35 W"),
        ("RTX 3050 Laptop 6GB 75W", "RTX 3050 Laptop 6 GB 75 W"),
        ("NVIDIA GeForce RTX 3080, 12288 MiB", "RTX 3080 12 GB"),
        ("NVIDIA GeForce RTX 5090, 32607 MiB", "RTX 5090"),
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti 8 GB"),
        ("rtx4060ti 16gb", "RTX 4060 Ti 16 GB"),
        ("RTX 4090 D", "RTX 4090 D"),
        ("4090D", "RTX 4090 D"),
        ("4080 super", "RTX 4080 SUPER"),
        ("4070 laptop", "RTX 4070 Laptop 35 W"),  # the least that NVIDIA states
        ("laptop 4070 115W", "RTX 4070 Laptop 115 W"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU, 8188 MiB, 140 W", "RTX 4070 Laptop 115 W"),
        ("RTX 4060 (Laptop)", "RTX 4060 Laptop 35 W"),
        ("RTX 4060M", "RTX 4060 Laptop 35 W"),
        ("RTX 4060 \u7b14\u8bb0\u672c\u7535\u8111", "RTX 4060 Laptop 35 W"),
        ("AD107M [GeForce RTX 4060 Max-Q / Mobile]", "RTX 4060 Laptop 35 W"),
        ("NVIDIA GeForce RTX 2080 with Max-Q Design", "RTX 2080 Laptop"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU, 16384 MiB", "RTX 3080 Laptop 16 GB 80 W"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("Quadro RTX 4000", "Quadro RTX 4000"),
        ("NVIDIA RTX 4000 Ada Generation", "RTX 4000 Ada"),
        ("NVIDIA RTX 4000 SFF Ada Generation", "RTX 4000 SFF Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Blackwell Max-Q"),
        ("TITAN RTX", "TITAN RTX"),
        ("dgx spark", "DGX Spark"),
        ("NVIDIA GB10", "DGX Spark"),
        ("jetson orin nano super", "Jetson Orin Nano 8 GB MAXN SUPER"),
        ("Orin Nano 4GB", "Jetson Orin Nano 4 GB MAXN SUPER"),
        ("orin nx 16 GB 25W", "Jetson Orin NX 16 GB 25W"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "Jetson AGX Orin 64 GB MAXN"),
        ("NVIDIA Jetson AGX Thor Developer Kit", "Jetson T5000 MAXN"),
        ("T4000", "Jetson T4000 MAXN"),
    ],
)
def test_loose_names(name, full_name):
    assert find_gpu(name).name == full_name


def test_a_laptops_rate_grows_with_its_power():
    """Between the two that NVIDIA states: 1230 MHz at 35 W, 2175 at 115."""
    low, middle, high = (find_gpu(f"4070 laptop {watts}W") for watts in (35, 75, 115))
    assert low.tflops["fp16"] == pytest.approx(36 * 512 * 1230e6 / 1e12)
    assert high.tflops["fp16"] == pytest.approx(36 * 512 * 2175e6 / 1e12)
    assert 2 * middle.tflops["fp8"] == pytest.approx(low.tflops["fp8"] + high.tflops["fp8"])
    with pytest.raises(ConfigError, match="RTX 4070 Laptop takes from 35 to 115 W, not 20"):
        find_gpu("4070 laptop 20W")


@pytest.mark.parametrize(
    ("name", "near", "target"),
    [
        ("NVIDIA GeForce RTX 4060 SUPER", "RTX 4060", "sm89"),
        ("NVIDIA GeForce RTX 5090 D v2", "RTX 5090", "sm120"),
        ("RTX 3070 16GB", "RTX 3070", "sm86"),
        ("NVIDIA A10", "", "sm86"),
        ("NVIDIA A100-SXM4-80GB", "", "sm80"),
        ("NVIDIA L40S", "", "sm89"),
        ("NVIDIA RTX 4000 Ada Generation Laptop GPU", "RTX 4000 Ada", "sm89"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Blackwell", "sm120"),
        ("Tesla T4", "", "sm75"),
    ],
)
def test_another_gpu_is_never_taken_for_a_known_one(name, near, target):
    with pytest.raises(ConfigError, match=rf"For this one use --target {target}, --b") as refused:
        find_gpu(name)
    assert near in str(refused.value) and ("did you mean" in str(refused.value)) == bool(near)


@pytest.mark.parametrize(
    "name",
    ["RTX 1", "AMD Radeon RX 7600", "4060 4060", "", "RTX", "RTX 40 60", "gpu 0:", "laptop"],
)
def test_an_unknown_gpu_is_refused(name):
    with pytest.raises(ConfigError, match=r"no figures for a GPU '.*'.*others use --target"):
        find_gpu(name)


def test_the_nearest_names_come_first():
    with pytest.raises(ConfigError, match="did you mean RTX 4070 SUPER or RTX 4070 Laptop or"):
        find_gpu("4070 super laptop")


def test_a_typing_error_is_named():
    with pytest.raises(ConfigError, match="did you mean RTX 4070"):
        find_gpu("RTX 4071")


def test_the_gpu_here(monkeypatch):
    """By the name, the memory and the power limit that the driver states."""
    gpu = nvml.Gpu(0, "NVIDIA GeForce RTX 3080 Laptop GPU", "sm86", 16384 << 20, 1 << 30, 150.0)
    monkeypatch.setattr(nvml, "gpus", lambda: [gpu])
    assert find_gpu("here").name == "RTX 3080 Laptop 16 GB 150 W"


@pytest.mark.parametrize(
    ("board", "target", "memory_mib", "name"),
    [
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0", "sm87", 7620,
         "Jetson Orin Nano 8 GB MAXN SUPER"),
        ("NVIDIA Jetson AGX Orin Developer Kit\0", "sm87", 30699, "Jetson AGX Orin 32 GB MAXN"),
        ("NVIDIA Jetson AGX Thor Developer Kit\0", "sm110", 125772, "Jetson T5000 MAXN"),
        (None, "sm121", 122502, "DGX Spark"),
    ],
)  # fmt: skip
def test_a_board_here(monkeypatch, tmp_path, board, target, memory_mib, name):
    """By the name of the board and the memory that the system has of the module's."""
    gpu = nvml.Gpu(0, "Orin" if board else "NVIDIA GB10", target, memory_mib << 20, 1 << 30)
    monkeypatch.setattr(nvml, "gpus", lambda: [gpu])
    monkeypatch.setattr(gpus, "BOARD", tmp_path / "model")
    if board:
        (tmp_path / "model").write_text(board)
    assert find_gpu("here").name == name


def test_no_gpu_here(monkeypatch):
    def none():
        raise BackendError("no NVIDIA driver answers")

    monkeypatch.setattr(nvml, "gpus", none)
    with pytest.raises(BackendError, match="no NVIDIA driver"):
        find_gpu("HERE")


def test_stated_figures():
    gpu = parse_rates("fp16=30.2, fp8=60,bandwidth=272", "sm89", 8)
    assert gpu.target == "sm89" and gpu.bandwidth == 272 and gpu.memory == 8
    assert gpu.tflops == {"fp16": 30.2, "fp8": 60}


@pytest.mark.parametrize(
    "text", ["", "30", "fp16=30", "fp16=a,bandwidth=1", "fp16=nan,bandwidth=1", "fp5=1", "fp16=-1"]
)
def test_wrong_figures_are_refused(text):
    with pytest.raises(ConfigError, match="like fp16=30,fp8=60,bandwidth=272"):
        parse_rates(text, "sm89", 8)
