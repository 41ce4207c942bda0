"""Devices and models of the example profiles: data sheets, assumptions, and where they are from.

`python -m isthmus.splitter.example_devices` writes the profiles anew into example_profiles/.
"""

from __future__ import annotations

from typing import Final

from isthmus.protocol.profiles import DeviceProfile
from isthmus.splitter.roofline import DeviceSpec, ModelSizes, modelled_profile

DATED: Final = "2026-11-22"

_METHOD: Final = (
    "Modelled, nothing measured: roofline of the vendor's peaks at the stated efficiencies; decode "
    "streams all weights and the KV, prefill computes 2 operations per weight and row. "
)
# 8-bit integers, per block of 32 an f32 scale and an 8-bit zero point.
_Q8_BYTES: Final = 1 + 4 / 32 + 1 / 32

MODELS: Final = (
    # config.json of HuggingFaceTB/SmolLM2-135M-Instruct
    ModelSizes("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152),
    # config.json of meta-llama/Llama-3.2-1B-Instruct
    ModelSizes("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256),
)

DEVICES: Final[dict[str, tuple[DeviceSpec, str]]] = {
    "jetson-orin-nano": (
        DeviceSpec(
            side="edge",
            name="Jetson Orin Nano 8GB, 15 W",
            provider="cuda",
            threads=6,
            precision="q8-affine",
            bytes_per_weight=_Q8_BYTES,
            kv_item_bytes=4,
            memory_bytes_per_s=68e9,
            ops_per_s=5e12,
            attention_ops_per_s=1.28e12,
            memory_efficiency=0.6,
            compute_efficiency=0.4,
            layer_overhead_s=100e-6,
            step_overhead_s=200e-6,
            load_bytes_per_s=1e9,
            codec_bytes_per_s=0.6e9,
            copies=1.3,
            batches=False,
            idle_w=5.0,
            active_w=15.0,
        ),
        "NVIDIA Jetson Orin Nano series data sheet: 128-bit LPDDR5 of 68 GB/s, 1024 CUDA and 32 tensor "
        "cores at 625 MHz, 40 sparse or 20 dense INT8 TOPS, so 5 TFLOPS dense in TF32 and 1.28 in FP32 "
        "(attention), power mode 15 W. Assumed: 60 % of the bandwidth (NVIDIA's published 27.7 tokens/s "
        "for Llama 3.2 3B in INT4 are about 70 %), 40 % of the operations, 100 µs to launch a layer's "
        "kernels, 5 W idle, NVMe at 1 GB/s.",
    ),
    "laptop-8-core": (
        DeviceSpec(
            side="edge",
            name="AMD Ryzen 7 7840U, 8 cores, 15 W",
            provider="cpu",
            threads=8,
            precision="q8-affine",
            bytes_per_weight=_Q8_BYTES,
            kv_item_bytes=4,
            memory_bytes_per_s=89.6e9,
            ops_per_s=3.38e12,
            attention_ops_per_s=0.84e12,
            memory_efficiency=0.5,
            compute_efficiency=0.3,
            layer_overhead_s=40e-6,
            step_overhead_s=50e-6,
            load_bytes_per_s=1e9,
            codec_bytes_per_s=1.5e9,
            copies=1.3,
            batches=False,
            idle_w=5.0,
            active_w=20.0,
        ),
        "AMD's specifications of the Ryzen 7 7840U: 8 cores of Zen 4 at a base of 3.3 GHz, two channels "
        "of DDR5-5600 (89.6 GB/s), cTDP 15-30 W. 512 bits of VNNI per cycle are 128 INT8 operations per "
        "core and cycle, 3.38 TOPS; FP32 (attention) a quarter. Assumed: half of the bandwidth and 30 % "
        "of the operations at 15 W, 40 µs of operator overhead per layer, 5 W for the idle laptop and as "
        "much beside the CPU when active, NVMe with hashing at 1 GB/s.",
    ),
    "h100-sxm": (
        DeviceSpec(
            side="cloud",
            name="NVIDIA H100 SXM5 80GB",
            provider="cuda",
            threads=0,
            precision="bf16",
            bytes_per_weight=2.0,
            kv_item_bytes=2,
            memory_bytes_per_s=3.35e12,
            ops_per_s=989e12,
            attention_ops_per_s=989e12,
            memory_efficiency=0.6,
            compute_efficiency=0.4,
            layer_overhead_s=20e-6,
            step_overhead_s=300e-6,
            load_bytes_per_s=2e9,
            codec_bytes_per_s=1.5e9,
            copies=1.0,
            batches=True,
            idle_w=70.0,
            active_w=700.0,
        ),
        "NVIDIA H100 data sheet (SXM): HBM3 of 3.35 TB/s, 989 dense BF16 TFLOPS, up to 700 W. Assumed: 60 "
        "% of the bandwidth, 40 % of the operations, 20 µs per layer for kernels launched from a graph, "
        "300 µs per step for scheduling, 70 W idle, full power when active, weights from NVMe at 2 GB/s.",
    ),
}  # fmt: skip


def example_profiles() -> dict[str, DeviceProfile]:
    """All example profiles by name, `<device>-<model>`."""
    return {
        f"{key}-{model.name}": modelled_profile(model, device, dated=DATED, note=_METHOD + note)
        for key, (device, note) in DEVICES.items()
        for model in MODELS
    }


if __name__ == "__main__":
    from isthmus.splitter.profile_store import EXAMPLES_FOLDER, save_profile

    for name, profile in example_profiles().items():
        save_profile(EXAMPLES_FOLDER / f"{name}.json", profile)
