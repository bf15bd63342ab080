"""A trace's events by kind, and the time between them: on names of real kernels, and on small timelines."""

from __future__ import annotations

import pytest

from dist_cpt.train.time_by_kind import KINDS, Event, breakdown, kind_of, summary_lines

KERNELS = {
    "GEMM": (
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64_32x6_tn_align8>(Params)",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4, false>(float)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, true, false>(int)",
    ),
    "attention": (
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>, false, true>(Flash_fwd_params)",
        "void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128>>(Flash_bwd_params)",
        "void cutlass::device_kernel<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<2>>>(Params)",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel::Params)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "triton_tem_fused_flex_attention_backward_1",
    ),
    "communication": (
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclKernel_AllReduce_RING_LL_Sum_float(ncclWorkElem)",
    ),
    "memory-bound": (
        "rms_norm_backward_kernel",
        "cross_entropy_kernel",
        "adamw_kernel",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>(int)",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<1>>(int)",
        "void split_with_sizes_copy_out_contiguous_no_cast_kernel<float>(char**)",
        "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*)",
        "Memcpy HtoD (Pinned -> Device)",
        "Memset (Device)",
    ),
}
OPERATIONS = {
    "GEMM": ("aten::addmm", "aten::mm", "aten::addmm_", "aten::bmm", "aten::linear", "aten::_int_mm"),
    "attention": ("aten::scaled_dot_product_attention", "aten::_scaled_dot_product_flash_attention_for_cpu_backward"),
    "communication": ("c10d::allreduce_", "c10d::_allgather_base_", "gloo:all_reduce"),
    "memory-bound": ("aten::add_", "aten::copy_", "aten::_fused_adamw_", "aten::silu_backward", "aten::embedding"),
    None: (
        "autograd::engine::evaluate_function: MmBackward0",
        "torch::autograd::AccumulateGrad",
        "_LoraMlpBackward",
        "aten::empty_strided",
        "aten::transpose",
        "aten::t",
        "detach",
    ),
}


@pytest.mark.parametrize(
    ("name", "kind", "on_gpu"),
    [(name, kind, True) for kind, names in KERNELS.items() for name in names]
    + [(name, kind, False) for kind, names in OPERATIONS.items() for name in names],
)
def test_each_is_of_its_kind(name, kind, on_gpu):
    assert kind_of(name, on_gpu=on_gpu) == kind


def events(*spans: tuple[str, float, float]) -> list[Event]:
    return [Event(name, begin, end, end - begin) for name, begin, end in spans]


def test_the_time_of_a_gpu_is_counted_once():
    """Communication counts where nothing hides it; gaps are the host's inside a step and idle between steps."""
    found = breakdown(
        events(
            ("rms_norm_kernel", -5, 2),  # begun before the first step
            ("nvjet_tst", 3, 10),
            ("ncclDevKernel_AllGather", 8, 14),
            ("flash_fwd_kernel", 16, 20),
            ("nvjet_tst", 31, 45),  # behind the host
        ),
        [(0, 18), (25, 40)],
        on_gpu=True,
    )
    assert found.by_kind == {
        "GEMM": 7 + 14,
        "attention": 4,
        "memory-bound": 2,
        "communication": 4,
        "host": 1 + 2 + 6,
        "idle": 5,
    }
    assert (found.total, found.communication) == (45, 6)
    assert found.longest[0] == ("nvjet_tst", "GEMM", 21, 2)
    assert tuple(found.by_kind) == KINDS


def test_the_nested_operations_of_a_cpu_are_counted_once():
    nested = [
        Event("_LoraLinearBackward", 1, 19, 5),
        Event("aten::linear", 2, 12, 3),
        Event("aten::addmm", 4, 11, 7),
        Event("aten::scaled_dot_product_attention", 13, 17, 1),
        Event("aten::bmm", 14, 16, 2),
        Event("aten::add_", 21, 24, 3),
    ]
    found = breakdown(nested, [(0, 20), (22, 25)], on_gpu=False)
    times = {"GEMM": 10, "attention": 4, "memory-bound": 3, "communication": 0, "host": 7, "idle": 1}
    assert found.by_kind == times
    assert found.longest[0] == ("aten::addmm", "GEMM", 7, 1)


def test_the_summary_fits_on_a_screen():
    names = [f"{name} {number}" for number in range(9) for names in KERNELS.values() for name in names]
    found = breakdown(events(*((name, i, i + 1) for i, name in enumerate(names))), [(0, len(names))], on_gpu=True)
    lines = summary_lines(found, 1)
    assert len(lines) < 24
    assert max(map(len, lines)) <= 118
    assert [line.split()[0] for line in lines[1:7]] == list(KINDS)
