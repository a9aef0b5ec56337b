"""Figures of GPUs: rates against what NVIDIA publishes, and the names by which people know them."""

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
    [  # what NVIDIA states is sparse: twice the dense rate
        ("Jetson Orin Nano 8 GB", "int8", 67 / 2),
        ("Jetson Orin Nano 4 GB", "int8", 34 / 2),
        ("Jetson AGX Orin 64 GB", "int8", 170 / 2),
        ("Jetson T5000", "nvfp4", 2070 / 2),
        ("Jetson T4000", "nvfp4", 1200 / 2),
    ],
)
def test_rates_of_modules_are_half_of_what_nvidia_states(name, dtype, tflops):
    assert find_gpu(name).tflops[dtype] == pytest.approx(tflops, rel=0.02)


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
