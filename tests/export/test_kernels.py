"""The builder's list of kernels: what runs in which dtypes, and that no other does in silence."""

import pytest

from packforcing.errors import BackendError
from packforcing.export.kernels import KernelTypes, check_kernels, read_kernels
from packforcing.runtime.engine_records import Kernels, describe_kernels


def tensor(*shape: int, dtype: str = "Half") -> str:
    dims = ",".join(map(str, shape))
    return (
        f"{{ Name: x, Dimensions: [{dims}], Strides: [1], StrideOrder: [0], Datatype: {dtype}, "
        "Format: (Linear) Row major linear format }"
    )


def kernel(name: str, kind: str, inputs: list[str], constants: list[str], output: str) -> str:
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {', '.join(inputs)}], Constants: "
        f"[ {', '.join(constants)}], Outputs: [ {output}], TacticName: y, StreamId: 0, "
        "Metadata: [ONNX Layer: node_MatMul_1]"
    )


def listing(*kernels: str) -> str:
    return "\n".join(("Layers:", *kernels, "", "Bindings:", " Name: flow, IOMode: Output"))


Q, K, V = (12, 6240, 128), (12, 128, 27872), (12, 27872, 128)
CALLS = ["block", "compressed"]


def attention(index: int, dtype: str, profile: int = 0) -> str:
    inputs = [tensor(*shape, dtype=dtype) for shape in (Q, K)]
    inputs += [tensor(1, 1, 1, 1, dtype="Int32"), tensor(*V, dtype=dtype)]
    return kernel(f"_gemm_mha_v2_myl{profile}_{index}", "kgen", inputs, [], tensor(*Q))


def test_attention_is_counted_by_call_and_dtype():
    text = listing(*(attention(n, "FP8") for n in range(3)), attention(3, "Half"),
                   attention(0, "Half", profile=1))  # fmt: skip
    assert read_kernels(text, CALLS) == (
        Kernels("block", "attention", ("fp16",) * 3, 1),
        Kernels("block", "attention", ("fp8",) * 3, 3),
        Kernels("compressed", "attention", ("fp16",) * 3, 1),
    )


@pytest.mark.parametrize(
    "name, kind, inputs, constants, operands",
    [
        (  # three products in one, their scales and a factor
            "node_1+node_2+node_3_myl0_8", "gemm", [tensor(1, 6240, 1536)],
            [tensor(1, 1536, 4608), tensor(1, dtype="Float"), tensor(1, dtype="Float")],
            ("fp16", "fp16", 1536 * 4608),
        ),
        (  # a batch of three, their block scales, and two factors
            "node_1+node_2+node_3_myl0_45", "gemm",
            [tensor(1, 6240, 1536, dtype="FP4E2M1"), tensor(1, 49, 4, 32, 24, 4, dtype="FP8")],
            [tensor(3, 1536, 1536, dtype="FP4E2M1"), tensor(1, dtype="Float"),
             tensor(1, dtype="Float"), tensor(3, 12, 4, 24, 4, 32, dtype="FP8")],
            ("nvfp4", "nvfp4", 3 * 1536 * 1536),
        ),
        (  # fused with a bias, a gate and what is added
            "__myl_FcAddMulAdd_myl0_22", "runtime_fusion",
            [tensor(1, 1, 1536), tensor(1, 6240, 1536), tensor(1, 6240, 8960, dtype="FP8")],
            [tensor(1, 1, 1536), tensor(1, 8960, 1536, dtype="FP8")],
            ("fp8", "fp8", 8960 * 1536),
        ),
        (  # weight-only
            "__myl_CastMulCastFc_myl0_36", "runtime_fusion", [tensor(1, 6240, 1536)],
            [tensor(1, 1, 1536), tensor(1, 1536, 1536, dtype="Int8")],
            ("fp16", "int8", 1536 * 1536),
        ),
        (  # weights that another kernel dequantized
            "__myl_FcAddMulTanh_myl0_33", "runtime_fusion",
            [tensor(1, 6240, 1536), tensor(1, 1536, 8960)], [tensor(1, 1, 8960)],
            ("fp16", "fp16", 1536 * 8960),
        ),
    ],
)  # fmt: skip
def test_products_are_counted_by_the_values_of_their_matrices(
    name, kind, inputs, constants, operands
):
    *dtypes, weights = operands
    output = tensor(1, 6240, 8960 if "Tanh" in name else 1536)
    text = listing(kernel(name, kind, inputs, constants, output))
    assert read_kernels(text, CALLS) == (Kernels("block", "product", tuple(dtypes), 1, weights),)


def test_other_kernels_are_not_counted():
    cast = kernel("__myl_Cast_myl0_5", "kgen", [tensor(1, 4, dtype="Float")], [], tensor(1, 4))
    assert read_kernels(listing(cast), CALLS) == ()


def test_a_type_that_does_not_run_fails_with_what_runs_instead():
    kernels = [
        Kernels("block", "attention", ("fp16",) * 3, 1),
        Kernels("block", "attention", ("fp8",) * 3, 3),
        Kernels("block", "product", ("fp8", "fp8"), 2, 100),
        Kernels("block", "product", ("fp16", "fp8"), 2, 50),
    ]
    check_kernels(kernels, [KernelTypes("attention", "fp8", 3)], ["block"])
    check_kernels(kernels, [KernelTypes("product", "fp8", 100)], ["block"])
    with pytest.raises(
        BackendError,
        match=r"attention of block was to run in fp8 \(4 kernels\), but the builder lists 1 "
        r"kernels in fp16 x fp16 x fp16, 3 kernels in fp8 x fp8 x fp8",
    ):
        check_kernels(kernels, [KernelTypes("attention", "fp8", 4)], ["block"])
    with pytest.raises(BackendError, match="product of block was to run in fp8"):
        check_kernels(kernels, [KernelTypes("product", "fp8", 101)], ["block"])
    with pytest.raises(BackendError, match=r"attention of compressed .* lists none"):
        check_kernels(kernels, [KernelTypes("attention", "fp8", 1)], CALLS)


def test_kernels_are_described_in_a_line():
    kernels = [
        Kernels("block", "attention", ("fp8",) * 3, 30),
        Kernels("block", "attention", ("fp16",) * 3, 30),
        Kernels("block", "product", ("fp16", "int8"), 9, 1_500_000),
    ]
    line = describe_kernels(kernels)
    assert line == "attention fp8 (30), fp16 (30); product fp16 x int8 (1.5 M weights)"
